"""Bounds of scores, probabilities and weighted sums.

Against fractions and decimals, against the roundings of engines, and against mistakes.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.testing import arrays
from llama_layers.verify import (
    judge,
    probabilities_bound,
    scores_bound,
    softmax_bound,
    weighted_sum_bound,
)
from tests.support import decimals, engines, oracle
from tests.support.bounds_cases import (
    TINY,
    causal,
    gamma,
    heads,
    problems,
    relative,
    roundoffs,
    stated_probabilities,
    tf32,
)
from tests.support.engines import DTYPES, through, wide

ALL = pytest.mark.parametrize("dtype", DTYPES)
NARROW = pytest.mark.parametrize("dtype", engines.NARROW)


# Scores


@ALL
@given(data=st.data())
def test_scores_true_error_is_within_the_limit(dtype, data):
    """Scaled before, after or half and half, against fractions."""
    q, k, _, _, scale = data.draw(problems(dtype, max_magnitude=np.inf))
    with np.errstate(all="ignore"):
        bound = scores_bound(q, k, scale=scale)
        forms = [engines.scores(q, k, scale, form=f) for f in ("after", "before", "half")]
        forms = [form.astype(q.dtype) for form in forms]
    group = q.shape[2] // k.shape[2]
    for place in zip(*np.nonzero(np.isfinite(bound.limit)), strict=True):
        _, h, s, t = place
        exact = sum(oracle.exact(q[0, s, h]) * oracle.exact(k[0, t, h // group]))
        exact *= Fraction(scale)
        limit = Fraction(float(bound.limit[place]))
        assert abs(Fraction(float(bound.exact[place])) - exact) <= limit
        for form in forms:
            assert abs(Fraction(float(form[place])) - exact) <= limit


@ALL
def test_scores_limit_is_the_formula(rng, dtype):
    q, k, _ = heads(rng, dtype)
    u, out = roundoffs(dtype)
    a = np.einsum("bshd,bhtd->bhst", q.astype(float), engines.repeated(k.astype(float), 6))
    sizes = np.einsum(
        "bshd,bhtd->bhst", abs(q).astype(float), engines.repeated(abs(k).astype(float), 6)
    )
    once = gamma(68, u) * (2 if dtype == "float64" else 1) * sizes * 0.3
    bound = scores_bound(q, k, scale=0.3)
    within = {"rtol": 1e-4, "atol": 1.01 * TINY[dtype]}  # a result may underflow
    np.testing.assert_allclose(bound.limit, once * (1 + out) + out * abs(0.3 * a), **within)
    usual = once * 4 * math.sqrt(68) * u / gamma(68, u)
    np.testing.assert_allclose(bound.usual, usual * (1 + out) + out * abs(0.3 * a), **within)
    assert (bound.usual <= bound.limit).all()
    if dtype == "float32":
        rounded = 2 * 2.0**-8 * abs(0.3 * a) + once
        limit = scores_bound(q, k, scale=0.3, scores="bfloat16").limit
        np.testing.assert_allclose(limit, rounded, rtol=1e-2)
        read = scores_bound(through(q, "float16"), through(k, "float16"), scale=0.3)
        bound = scores_bound(q, k, scale=0.3, kv_cache="float16")
        np.testing.assert_array_equal(bound.exact, read.exact)
        np.testing.assert_array_equal(bound.limit, read.limit)


@NARROW
def test_rounded_scores_are_told_apart(rng, dtype):
    """Before and after they are scaled; queries and keys rounded first."""
    q, k, _ = heads(rng, dtype)
    y = engines.scores(q, k, 0.3, between=dtype).astype(q.dtype)
    assert judge(y, scores_bound(q, k, scale=0.3)).verdict == "FAIL"
    assert judge(y, scores_bound(q, k, scale=0.3, scores=dtype)).verdict == "PASS"
    assert judge(y, scores_bound(q, k, scale=0.3, scores=dtype)).ratio > 0.7
    q32, k32, _ = heads(rng, "float32")
    y = engines.scores(q32, k32, 0.3, operands=dtype)
    assert judge(y, scores_bound(q32, k32, scale=0.3)).verdict == "FAIL"
    assert judge(y, scores_bound(q32, k32, scale=0.3, kv_cache=dtype)).verdict == "PASS"
    for form in ("float32", "float64"):
        bound = scores_bound(q32, k32, scale=0.3, scores=form, kv_cache=form)
        np.testing.assert_array_equal(bound.limit, scores_bound(q32, k32, scale=0.3).limit)


def test_wrong_scores_fail(rng):
    q, k, _ = heads(rng, "float32")
    bound = scores_bound(q, k, scale=0.125)
    wrong = {
        "TF32": engines.scores(tf32(q), tf32(k), 0.125),
        "bfloat16": engines.scores(q, k, 0.125, operands="bfloat16"),
        "scale": engines.scores(q, k, 1 / math.sqrt(63)),
        "heads": engines.scores(q[:, :, ::-1], k, 0.125),
        "tiled heads": engines.scores(q, np.tile(k, (1, 1, 3, 1)), 0.125),
        "channel": engines.scores(np.where(np.arange(64) == 5, 0, q), k, 0.125),
    }
    for name, y in wrong.items():
        assert judge(y, bound).ratio > 2, name


def test_scores_that_overflow_vanish_or_are_not_finite():
    q = np.array([1e30, 1e20, 0, np.inf, np.nan, 2.0**-100], np.float32).reshape(1, 6, 1, 1)
    k = np.array([1e30, 2.0**-100], np.float32).reshape(1, 2, 1, 1)
    with np.errstate(all="ignore"):
        bound = scores_bound(q, k, scale=1e-12)
        y = engines.scores(q, k, 1e-12)
    assert np.isinf(bound.limit[0, 0, 0, 0])  # before it is scaled
    assert (bound.limit[0, 0, 2] == 0).all()
    assert bound.ratio(y).max() <= 1
    assert (bound.ratio(np.zeros_like(y))[0, 0, 3:5] == np.inf).all()
    half = scores_bound(q[:, 1:3], k, scale=1e-12, scores="float16")
    assert np.isinf(half.limit[0, 0, 0, 0])
    half = scores_bound(q[:, 1:3], k, scale=1e-12, kv_cache="float16")
    assert np.isinf(half.limit[0, 0, 0]).all()
    assert np.isinf(scores_bound(q[:, 1:2], k, scale=1.0, dtype="float16").limit[0, 0, 0, 0])


def test_scores_of_flushing_engines():
    q = np.full((1, 1, 1, 2), 2.0**-70, np.float32)
    small = np.full((1, 1, 1, 2), 2.0**-128, np.float32)
    zero, large = np.zeros((1, 1, 1, 1), np.float32), np.full((1, 1, 1, 2), 2.0**20, np.float32)
    for other in (q, small):
        a = large if other is small else q
        assert scores_bound(a, other, scale=1.0).ratio(zero) > 1
        assert scores_bound(a, other, scale=1.0, flushes=True).ratio(zero) <= 1


# Softmax and probabilities


@ALL
@given(data=st.data())
def test_softmax_true_error_is_within_the_limit(dtype, data):
    shape = (1, 2, 2, data.draw(st.integers(1, 5)))
    a = data.draw(arrays(shape, dtype=dtype, max_magnitude=200.0))
    bits = data.draw(st.integers(0, 2 ** (2 * shape[3]) - 1))
    mask = np.array([bits >> i & 1 for i in range(2 * shape[3])], bool).reshape(2, shape[3])
    bound = softmax_bound(a, mask=mask)
    p = engines.softmax(a.astype(wide(dtype)), mask).astype(a.dtype)
    assert bound.ratio(p).max() <= 1
    for h, s in np.ndindex(2, 2):
        if not mask[s].any():
            assert not bound.exact[0, h, s].any()
            assert not bound.limit[0, h, s].any()
            continue
        row = np.where(mask[s], decimals.decimals(a[0, h, s]), None)
        exact = np.array(decimals.softmax(row))
        assert (decimals.errors(p[0, h, s], exact) <= bound.limit[0, h, s]).all()
        assert (decimals.errors(bound.exact[0, h, s], exact) <= bound.limit[0, h, s]).all()


@ALL
def test_softmax_limit_is_the_formula(rng, dtype):
    a = (3 * rng.standard_normal((1, 2, 5, 40))).astype(DTYPES[dtype])
    mask, n = causal(5, 40), 40
    u, out = roundoffs(dtype)
    own = 2 if dtype == "float64" else 1
    bound = softmax_bound(a, mask=mask)
    for h, s in np.ndindex(2, 5):
        row = a[0, h, s].astype(float)
        p, eta, r = stated_probabilities(row, np.zeros(n), mask[s], u)
        for growth, limits in ((gamma(n, u), bound.limit), (4 * math.sqrt(n) * u, bound.usual)):
            kappa = relative(2 * math.log1p(u), -math.log1p(-growth))
            for t in p:
                once = p[t] * (eta[t] + r + kappa * (1 + eta[t])) / (1 - r) * own
                stated = once * (1 + out) + out * p[t]
                close = pytest.approx(stated, rel=1e-4, abs=1.01 * TINY[dtype])
                assert limits[0, h, s, t] == close
    assert not bound.limit[0, :, ~mask].any()


def test_probabilities_limit_is_the_formula(rng):
    q, k, _ = heads(rng, "float32", size=1.0)
    mask, u = causal(24), 2.0**-24
    for options in ({}, {"scores": "bfloat16"}, {"kv_cache": "float16"}):
        bound = probabilities_bound(q, k, mask=mask, scale=0.125, **options)
        a = scores_bound(q, k, scale=0.125, **options)
        for h, s in ((0, 0), (3, 11), (5, 23)):
            p, eta, r = stated_probabilities(a.exact[0, h, s], a.limit[0, h, s], mask[s], u)
            kappa = relative(2 * math.log1p(u), -math.log1p(-gamma(24, u)))
            for t in p:
                stated = p[t] * (eta[t] + r + kappa * (1 + eta[t])) / (1 - r)
                assert bound.limit[0, h, s, t] == pytest.approx(stated, rel=1e-4)


@ALL
def test_probabilities_of_engines(rng, dtype):
    q, k, _ = heads(rng, dtype)
    mask = causal(24)
    bound = probabilities_bound(q, k, mask=mask, scale=0.125)
    p = engines.softmax(engines.scores(q, k, 0.125, form="before"), mask).astype(q.dtype)
    assert judge(p, bound).verdict == "PASS"
    eager = engines.softmax(engines.scores(q, k, 0.125, between=dtype), mask).astype(q.dtype)
    flagged = probabilities_bound(q, k, mask=mask, scale=0.125, scores=dtype)
    assert judge(eager, flagged).verdict == "PASS"
    if dtype in engines.NARROW:
        assert judge(eager, bound).verdict == "FAIL"


def test_wrong_probabilities_fail(rng):
    q, k, _ = heads(rng, "float32")
    mask, a = causal(24), engines.scores(q, k, 0.125)
    p = engines.softmax(a, mask)
    one_more = mask.copy()
    one_more[11, 12] = True
    wrong = {
        "one mask bit": engines.softmax(a, one_more),
        "scores not scaled": engines.softmax(8 * a, mask),
        "base 2": engines.softmax(a * np.float32(math.log(2)), mask),
        "bfloat16": through(p, "bfloat16"),
        "float16": through(p, "float16"),
        "not normalised": p * np.float32(1.001),
        "bfloat16 exponentials": through(np.exp(a), "bfloat16") * mask,
    }
    for bound in (softmax_bound(a, mask=mask), probabilities_bound(q, k, mask=mask, scale=0.125)):
        for name, y in wrong.items():
            assert judge(y, bound).ratio > 5, name


def test_masks_of_each_sequence_and_masks_to_add(rng):
    a = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
    masks = np.stack([causal(4), np.eye(4, dtype=bool)])
    both = softmax_bound(a, mask=masks)
    for b in range(2):
        one = softmax_bound(a[b : b + 1], mask=masks[b])
        np.testing.assert_array_equal(both.exact[b : b + 1], one.exact)
        np.testing.assert_array_equal(both.limit[b : b + 1], one.limit)
    same = softmax_bound(a, mask=causal(4)[None])
    np.testing.assert_array_equal(same.exact, softmax_bound(a, mask=causal(4)).exact)
    added = np.where(masks, 0, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(softmax_bound(a, mask=added).exact, both.exact)
    finite = np.where(masks, 0, -1e4).astype(np.float32)
    p = engines.softmax(a + finite[:, None], np.ones((4, 4), bool))
    assert judge(p, softmax_bound(a, mask=finite)).verdict == "PASS"
    # A query that may see nothing sees everything with a mask to add.
    nothing = np.full((4, 4), -1e4, np.float32)
    p = engines.softmax(a + nothing, np.ones((4, 4), bool))
    assert judge(p, softmax_bound(a, mask=nothing)).verdict == "PASS"
    assert judge(p, softmax_bound(a, mask=np.zeros((4, 4), bool))).verdict == "FAIL"
    coarse = a + np.float32(-1e7)  # the sum with the mask is rounded to whole numbers
    p = engines.softmax(coarse, np.ones((4, 4), bool))
    assert judge(p, softmax_bound(a, mask=np.full((4, 4), -1e7, np.float32))).ratio <= 1


def test_softmax_of_what_is_not_finite():
    inf, nan = np.inf, np.nan
    rows = [[1, inf, 0], [nan, 0, 1], [-inf, 0, 0], [-inf, -inf, -inf], [3e38, -3e38, 0]]
    a = np.array(rows, np.float32)[None, None]
    bound = softmax_bound(a)
    assert np.isinf(bound.limit[0, 0, [0, 1, 3]]).all()
    np.testing.assert_array_equal(bound.exact[0, 0, 2], [0, 0.5, 0.5])
    np.testing.assert_array_equal(bound.exact[0, 0, 4], [1, 0, 0])
    assert (bound.limit[0, 0, [2, 4]] < 1e-4).all()
    hides = softmax_bound(a, mask=np.array([[True, False, True]] * 5))
    assert np.isfinite(hides.limit[0, 0, 0]).all()


# Weighted sums


@ALL
@given(data=st.data())
def test_weighted_sums_are_within_the_limit(dtype, data):
    _, _, v, mask, _ = data.draw(problems(dtype, max_magnitude=np.inf))
    kv_heads, (queries, keys) = v.shape[2], mask.shape
    p = data.draw(arrays((1, 2 * kv_heads, queries, keys), dtype=dtype, max_magnitude=1.0))
    with np.errstate(all="ignore"):
        bound = weighted_sum_bound(p, v)
        terms = p[..., None, :].astype(wide(dtype))
        terms = terms * engines.repeated(v, 2 * kv_heads).swapaxes(2, 3)[:, :, None].astype(
            wide(dtype)
        )
        y = engines.one_by_one(terms).astype(v.dtype)
    for place in zip(*np.nonzero(np.isfinite(bound.limit)), strict=True):
        _, s, h, d = place
        exact = sum(oracle.exact(p[0, h, s]) * oracle.exact(v[0, :, h // 2, d]))
        limit = Fraction(float(bound.limit[place]))
        assert abs(Fraction(float(y[0, h, s, d])) - exact) <= limit
        assert abs(Fraction(float(bound.exact[place])) - exact) <= limit


@ALL
def test_weighted_sum_limit_is_the_formula(rng, dtype):
    _, _, v = heads(rng, dtype, keys=40)
    p = np.abs(rng.standard_normal((1, 6, 5, 40))).astype(DTYPES[dtype])
    u, out = roundoffs(dtype)
    values = engines.repeated(v.astype(float), 6)
    y = (p.astype(float) @ values).transpose(0, 2, 1, 3)
    sizes = (p.astype(float) @ abs(values)).transpose(0, 2, 1, 3)
    once = gamma(40, u) * sizes * (2 if dtype == "float64" else 1)
    bound = weighted_sum_bound(p, v)
    within = {"rtol": 1e-4, "atol": 1.01 * TINY[dtype]}  # a result may underflow
    np.testing.assert_allclose(bound.limit, once * (1 + out) + out * abs(y), **within)
    usual = once * 4 * math.sqrt(40) * u / gamma(40, u)
    np.testing.assert_allclose(bound.usual, usual * (1 + out) + out * abs(y), **within)
    if dtype == "float32":
        read = weighted_sum_bound(through(p, "float16"), through(v, "float16"))
        bound = weighted_sum_bound(p, v, kv_cache="float16")
        np.testing.assert_array_equal(bound.exact, read.exact)
        np.testing.assert_array_equal(bound.limit, read.limit)
        wrong = p.astype(float) @ through(values, "bfloat16")
        assert judge(wrong.transpose(0, 2, 1, 3), bound).verdict == "FAIL"


def test_weighted_sums_of_what_is_not_finite():
    p = np.array([[0.0, 1.0], [0.0, 0.0]], np.float32)[None, None]
    v = np.array([[np.nan, 1], [2, 3e38]], np.float32).reshape(1, 2, 1, 2)
    bound = weighted_sum_bound(p, v)
    assert np.isinf(bound.limit[0, :, 0, 0]).all()
    np.testing.assert_array_equal(bound.limit[0, 1, 0, 1], 0)
    assert np.isinf(weighted_sum_bound(4 * p, v).limit[0, 0, 0, 1])
    assert np.isinf(weighted_sum_bound(p, v, kv_cache="float16").limit[0, 0, 0, 1])
    tiny = np.full((1, 1, 1, 1), 2.0**-100, np.float32)
    zero = np.zeros((1, 1, 1, 1), np.float32)
    small = np.full_like(tiny, 2.0**-30)
    assert weighted_sum_bound(small, tiny).ratio(zero) > 1
    assert weighted_sum_bound(small, tiny, flushes=True).ratio(zero) <= 1
