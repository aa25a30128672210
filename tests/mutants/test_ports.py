"""Every planted bug that changes a value is found by `check`, at the right first site, and named.

A port is a copy of the package with the bug in it; see port.py. The right site is the first whose
array is another than without the bug.
"""

from __future__ import annotations

from pathlib import Path

import catalogue
import decoder
import decoding
import numpy as np
import port
import pytest
import runner
from port_causes import CAUSES, GENERAL, NO_CHANGE, UNNAMED
from random_models import model_of

from llama_layers.verify import Trace, check, sites

ROOT = Path(__file__).parents[2]
# Files that take part in a forward pass.
FILES = """
attend.py backends/numpy/linear.py batch.py cache.py embedding.py feed_forward.py layer.py mask.py
model.py norm.py projection.py qkv_weights.py rope.py weights.py
""".split()
EVERY = [*catalogue.MUTANTS, *decoder.MUTANTS, *decoding.MUTANTS]
MUTANTS = [mutant for mutant in EVERY if mutant.file in FILES]
CASES = 6  # of a bug that are checked
CHANGED = 1e-4  # relative: a bug of less may be within rounding


def run(directory, file):
    """Every activation of a copy of the package."""
    runner.with_copy(directory, port.run, file)
    return np.load(file)


def arrays_of(stored, case):
    prefix = f"{case[0]}|{case[1]}|"
    return {key.removeprefix(prefix): stored[key] for key in stored.files if prefix in key}


def first_change(wrong, right, keep, config):
    """The first site at which two runs differ where tokens are no padding; None if none does."""
    changed = []
    for site in sites(config):
        if site.pairwise or site.name not in wrong:
            continue
        a, b = wrong[site.name], right[site.name]
        if a.shape != b.shape:
            return None  # refused before anything is compared
        a, b = a[keep].astype(float), b[keep].astype(float)
        if not np.array_equal(a, b, equal_nan=True):
            changed.append((site.name, np.linalg.norm(a - b) / np.linalg.norm(b)))
    if not any(not difference <= CHANGED for _, difference in changed):
        return None
    return changed[0][0]


@pytest.fixture(scope="session")
def models():
    return {kind: model_of(c, port.weights_of(c)) for kind, c in port.configs().items()}


@pytest.fixture(scope="session")
def right(tmp_path_factory):
    """The port without a bug."""
    file = tmp_path_factory.mktemp("right") / "port.npz"
    return run(ROOT, file)


def trace_of(stored, case, model):
    keep = port.keep_of(case[1])
    return Trace(
        arrays_of(stored, case),
        port.case_ids(model.config),
        attention_mask=None if keep.all() else keep,
    )


def changes(wrong, right, models):
    """The first site that a bug changes in each case."""
    found = {}
    for case in port.cases():
        arrays = arrays_of(wrong, case)
        site = first_change(
            arrays, arrays_of(right, case), port.keep_of(case[1]), models[case[0]].config
        )
        if site is not None:
            found[case] = site
    return found


def test_no_false_alarm(right, models):
    for case in port.cases():
        report = check(trace_of(right, case, models[case[0]]), models[case[0]])
        assert report.agrees, (case, report.first)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_found_and_named(package, right, models, mutant, tmp_path):
    runner.plant(mutant, package)
    wrong = run(package.parent, tmp_path / "port.npz")
    changed = changes(wrong, right, models)
    assert (not changed) == (mutant.name in NO_CHANGE), changed
    chosen = list(changed)[:: -(-len(changed) // CASES) or 1]
    for case in chosen:
        model = models[case[0]]
        report = check(trace_of(wrong, case, model), model, explain=case == chosen[0])
        assert report.first is not None, case
        assert report.first.site.name == changed[case], case
        if case == chosen[0] and mutant.name not in UNNAMED:
            causes = [explanation.name for explanation in report.first.explanations]
            assert causes, report
            assert causes[0] == CAUSES[mutant.name], report


def test_most_are_named():
    named = [cause for cause in CAUSES.values() if cause not in GENERAL]
    assert len(named) >= 0.8 * (len(CAUSES) + len(UNNAMED))


def test_every_bug_has_its_place():
    names = {mutant.name for mutant in MUTANTS}
    assert set(CAUSES) | UNNAMED | NO_CHANGE == names
    assert len(CAUSES) + len(UNNAMED) + len(NO_CHANGE) == len(names)
