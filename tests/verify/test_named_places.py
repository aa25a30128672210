"""Arrays of other sites, and mistakes in a part of an array: what is evidence, and what is said."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, check
from tests.support.mistakes import quantised, read_off, solved
from tests.support.mistakes.mistake import ATTENTION, NORM, OUT, RESIDUAL, Mistake
from tests.support.ported import LAYER, run, told

RESIDUAL_SITE, OUT_SITE = (f"model.layers.{LAYER}.{role}" for role in (RESIDUAL, OUT))


def some_sites(trace, dtype):
    """What the product and the sum are made of, and they themselves."""
    names = (f"model.layers.{LAYER - 1}", f"model.layers.{LAYER}.{ATTENTION}", OUT_SITE)
    arrays = {name: trace.arrays[name].astype(dtype) for name in (*names, RESIDUAL_SITE)}
    return Trace(arrays, trace.input_ids)


def test_a_sum_that_absorbs_the_other_part_is_no_evidence():
    """A huge product is all that bfloat16 leaves of its sum with the residual stream."""
    noise = np.random.default_rng(1).standard_normal((2, 14, 32)).astype(np.float32)
    trace, model = run(Mistake("none", OUT, lambda p: 1e6 * (noise + np.sign(noise))))
    trace = some_sites(trace, ml_dtypes.bfloat16)
    assert np.array_equal(trace.arrays[OUT_SITE], trace.arrays[RESIDUAL_SITE])
    report = check(trace, model)
    assert report.first.site.name == OUT_SITE
    assert told(report) == []


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_sum_recorded_for_its_part(dtype):
    trace, model = run(Mistake("none", NORM, lambda p: p.right))
    trace = some_sites(trace, dtype)
    trace.arrays[OUT_SITE] = trace.arrays[RESIDUAL_SITE]
    assert told(check(trace, model)) == ["array of another site"]


def detail(name, number=0):
    every = (*read_off.MISTAKES, *quantised.MISTAKES, *solved.MISTAKES)
    mistake = [m for m in every if m.name == name][number]
    causes = check(*run(mistake)).first.explanations
    return causes[0].detail if causes else ""


def test_where_a_mistake_shows_is_said():
    assert detail("no causal mask").startswith("At head 2 only: the port seems to let a token see")
    assert detail("norm weight skipped").startswith("At channels 24..31 only: the port seems to")
    assert detail(
        "sign flipped"
    ) == "At channel 7 only: the port seems to have the numbers with " + ("the other sign.")
    assert detail("uniform attention").startswith("At tokens 4..7 only: the port seems to weigh")
    assert "in 2 of 28 rows" in detail("array of another site")
    assert "1 / sqrt(D): only scores are scaled" in detail("everything scaled")
    assert detail("a corrupted element").startswith("The port seems to have at [1, 6, 20] numbers")


def test_orders_and_codes_are_told():
    order = "input channels in another order"
    assert " in blocks of 8 whose halves are swapped; it " in detail(order)
    assert " in groups of 8, in the order 1, 4, 0, 3, 5, 2; it " in detail(order, 1)
    tile = "numbers of tokens 0..3 and outputs 16..23 at tokens 4..7 and outputs 8..15; it "
    assert tile in detail("a tile in another place")
    curve = "exponentials approximated"
    assert " of a number (linear between powers of two, lowered by 0.05798" in detail(curve)
    assert " as (1 + x / 256)^256; it " in detail(curve, 1)
    assert " zeros for the smallest 2 of 4 weights in a row; it " in detail("weights pruned", 0)
    codes = "weights quantised"
    assert " in int8, a scale for each row; it " in detail(codes, 1)
    assert " in float8 e4m3, a scale for the whole matrix; it " in detail(codes, 3)
    assert " in int8, a scale in float16 for each 16 inputs of a row; it " in detail(codes, 4)
    assert " in int4 with a zero point, a scale for each 16 inputs" in detail(codes, 5)
    assert " in int4, a scale for each 32 inputs of a row; it " in detail(codes)
