"""The planted bugs with CuPy's arrays: on a real GPU with ``-m gpu``, and on what stands in for it.

Those of CuPy's own bodies are planted on the stand-in by ``test_mutants.py``.
"""

from __future__ import annotations

import re

import pytest
import runner
from installed import GPUS, gpu
from random_models import CONFIGS
from write_table import MUTANTS

MARKED = {"stand-in": "not gpu", "cupy": "gpu"}
# Where CuPy has a body of its own in the place of the definition.
REPLACED = {"attend.py", "feed_forward.py", "norm.py"}
# What all of a model goes through.
OF_MODELS = {"batch.py", "cache.py", "embedding.py", "layer.py", "mask.py", "model.py", "rope.py"}
# Of these, what does not change the logits of a model on a GPU: because ...
NO_LOGITS = {
    # ... kernels do that there,
    "a token sees the next",
    "interleaved pairs put back in halves",
    "mask of the first block for every block",
    "only one half turned",
    "padding blanks queries in the place of keys",
    "padding ignored",
    "slots of a ring off by one",
    "turned the other way",
    "what goes round the end of a ring is lost",
    "window ignored",
    # ... only a difference of positions counts, or a model of other scaling, size or use,
    "earlier tokens not counted where padding comes late",
    "every chunk starts at position 0",
    "given positions ignored",
    "logits of the first token for the last",
    "mscale ignored",
    "phases in float32",
    "positions start at one",
    "the cache filled and not read",
    "the first columns of a long mask read",
    # ... or it is about what is refused, copied, or called.
    "a cache of fewer layers accepted",
    "a copied cache shares its memory",
    "a layer's arguments of any type",
    "a site named for another",
    "ids out of range taken from the end",
    "logits after padding are given",
    "negative ids count from the end",
    "tap called and not obeyed",
    "tokens written that the cache was not extended by",
}
# What a GPU may compute right all the same: because ...
BY_CHANCE = {
    # ... the other threads, or the copy, happened to be in time,
    "no barrier before the sums of the warps are read",
    "no barrier before the weights of other warps are read",
    "one place in main memory for the tokens of two steps",
    "uploads not waited for",
    "warps that read a sum before others have written theirs",
    # ... cuBLAS happened to choose a kernel that does so anyway,
    "sums of 16-bit results in 16 bits",
    # ... or memory that nobody has written to, or that is nobody's, happened to do no harm.
    "sums read of a piece in which nothing is seen",
    "threads beyond the last number write",
}


def nodes_of(mutant, kind):
    """The tests that find a bug with arrays of the device, if there may be any."""
    if mutant.killed_by.startswith("gpu/"):
        known = kind == "stand-in" or mutant.name in BY_CHANCE  # see test_mutants.py
        return [] if known else [mutant.killed_by.replace("stand-in", kind)]
    if "/numpy/" in mutant.file or mutant.file in REPLACED or mutant.name in NO_LOGITS:
        return []
    if re.search(r"\bnumpy\b", mutant.killed_by):
        return [mutant.killed_by.replace("numpy", kind)]
    if mutant.file in OF_MODELS:
        models = "gpu/test_on_gpu.py::test_like_naive_loops"
        return [f"{models}[{kind}-{name}-float32]" for name in CONFIGS]
    return []


@pytest.fixture(autouse=True)
def skipped_without_a_gpu(request):
    """At once: a test in a copy would find out late."""
    with gpu(request.getfixturevalue("kind")):
        pass


@pytest.mark.parametrize("kind", GPUS)
def test_nothing_fails_without_the_bugs(package, kind):
    assert {mutant.name for mutant in MUTANTS} >= NO_LOGITS | BY_CHANCE
    nodes = {node for mutant in MUTANTS for node in nodes_of(mutant, kind)}
    runner.assert_all_pass(package, *sorted(nodes), marked=MARKED[kind])


@pytest.mark.parametrize(
    ("mutant", "kind"),
    [
        pytest.param(mutant, kind, marks=marks, id=f"{mutant.name}-{kind}")
        for kind, marks in (("stand-in", ()), ("cupy", pytest.mark.gpu))
        for mutant in MUTANTS
        if nodes_of(mutant, kind)
    ],
)
def test_killed(package, mutant, kind):
    runner.plant(mutant, package)
    runner.assert_found(mutant, package, *nodes_of(mutant, kind), marked=MARKED[kind])
