"""What a mistake gives at some tokens is what it gives there in a whole array."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers.verify import sites
from llama_layers.verify.build import operation_of
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes import MISTAKES, Kind
from llama_layers.verify.mistakes.near import worst_alone
from llama_layers.verify.mistakes.registry import Computed
from llama_layers.verify.operation import Operation
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.validate import validated
from tests.support.mistakes import Mistake
from tests.support.ported import LAYER, run

TOKENS = np.array([2, 9])
FORMATS = Rounding("float32", "float32")
# What is read off an array needs one that is wrong.
READ_OFF_NOTHING = [m for m in MISTAKES if m.kind < Kind.SOLVED or m.loosens]


def failing_sites():
    """Each site of a layer, of a right port."""
    trace, model = run(Mistake("none", "input_layernorm", lambda p: p.right))
    recorded = validated(trace, model.config)
    for site in sites(model.config):
        if site.name in recorded.arrays and site.layer == LAYER:
            operation = operation_of(site, recorded.route(site), recorded, model)
            array = recorded.array(site.name)
            yield FailingSite(site, operation, array, FORMATS, recorded, model)


def same(few, whole):
    """Numbers and limits that differ by the order of sums at most."""
    for some, every in zip(vars(few).values(), vars(whole).values(), strict=True):
        np.testing.assert_allclose(some, every[:, TOKENS], rtol=1e-9, atol=1e-12)


@np.errstate(all="ignore")
def test_at_some_tokens():
    found = set()
    for at in failing_sites():
        for mistake in READ_OFF_NOTHING:
            for change in mistake.applied(at):
                operation = change.operation
                assert isinstance(operation, Operation | Computed)
                few = operation.at_tokens(TOKENS)
                if few is not None:
                    found.add((at.site.role, type(operation), mistake.formula))
                    same(few.bound(FORMATS), operation.bound(FORMATS))
    roles = {role for role, _, formula in found if formula}
    assert roles >= {"input_layernorm", "self_attn.attention", "mlp.act", "attention_residual"}
    assert len(found) > 20


@pytest.mark.parametrize("role", ["self_attn.attention", "mlp.gate_proj"])
def test_the_worst_alone(role):
    """The element that errs most, or its query, has the numbers and limits of the whole."""
    at = next(a for a in failing_sites() if a.site.role == role)
    spoilt = at.computed.copy()
    spoilt[1, 5, ..., 3] += 1
    at = FailingSite(at.site, at.operation, spoilt, FORMATS, at.recorded, at.model)
    operation, here = worst_alone(at)
    assert here[1] == slice(5, 6)
    few, whole = operation.bound(FORMATS), at.bound(FORMATS)
    for some, every in zip(vars(few).values(), vars(whole).values(), strict=True):
        np.testing.assert_allclose(some, every[here], rtol=1e-9, atol=1e-12)
    assert worst_alone(next(failing_sites())) is None
