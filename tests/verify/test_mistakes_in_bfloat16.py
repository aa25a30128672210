"""Wrong formulas are named in a port whose every array is rounded to bfloat16, too."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, judge, mistakes, sites
from llama_layers.verify.build import operation_of
from llama_layers.verify.diagnose import diagnose
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes import Kind
from llama_layers.verify.operations import Logprobs
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.validate import validated
from tests.support.mistakes import Mistake
from tests.support.ported import CONFIGS, LAYER, run

pytestmark = pytest.mark.slow
FORMATS = Rounding("bfloat16", "float32")
# Those that no site shows in so few bits, without padding or with pairs half a head apart, and
# those that need other sites, too.
NOT_HERE = {
    "another eps",
    "another token's norm",
    "RoPE layout half",
    "eps outside the root",
    "gelu with erf for gelu",
    "hidden state normalised already",
    "hidden states one place late",
    "padding at the other end",
    "padding counted in positions",
    "padding seen",
}
FORMULAS = {
    mistake.name: mistake
    for mistake in mistakes.MISTAKES
    if mistake.kind is Kind.FORMULA
    and mistake.name not in NOT_HERE
    and mistake.operations is not Logprobs  # which has tests of its own
}


def planted(mistake):
    """A site whose array has the mistake, among arrays that are right."""
    for config in CONFIGS:
        trace, model = run(Mistake("none", "input_layernorm", lambda p: p.right, config))
        arrays = {name: y.astype(ml_dtypes.bfloat16) for name, y in trace.arrays.items()}
        recorded = validated(Trace(arrays, trace.input_ids), model.config)
        for site in sites(model.config):
            if site.pairwise or site.layer not in (None, LAYER):
                continue
            operation = operation_of(site, recorded.route(site), recorded, model)
            right = operation.bound(FORMATS)
            array = right.exact.astype(ml_dtypes.bfloat16)
            at = FailingSite(site, operation, array, FORMATS, recorded, model)
            for change in mistake.applied(at):
                wrong = change.operation.bound(FORMATS).exact.astype(ml_dtypes.bfloat16)
                if judge(wrong, right).verdict == "FAIL":
                    return FailingSite(site, operation, wrong, FORMATS, recorded, model)
    return pytest.fail("no site shows the mistake")


@pytest.mark.parametrize("mistake", FORMULAS.values(), ids=FORMULAS)
@np.errstate(all="ignore")
def test_named(mistake):
    assert mistake.name in [explanation.name for explanation in diagnose(planted(mistake))]
