"""The bound of attention as a whole, and what the bounds of its parts refuse.

Against decimals, against the roundings of engines, and against mistakes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import attention
from llama_layers.verify import attention as tiling
from llama_layers.verify import (
    attention_bound,
    judge,
    probabilities_bound,
    scores_bound,
    softmax_bound,
    weighted_sum_bound,
)
from tests.support import decimals, engines
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
from tests.support.engines import DTYPES, through

ALL = pytest.mark.parametrize("dtype", DTYPES)
NARROW = pytest.mark.parametrize("dtype", engines.NARROW)


@ALL
@given(data=st.data())
def test_attention_true_error_is_within_the_limit(dtype, data):
    """Our own, in steps and online, against decimals."""
    q, k, v, mask, scale = data.draw(problems(dtype))
    bound = attention_bound(q, k, v, mask=mask, scale=scale, block=1)
    exact = decimals.attention(q[0], k[0], v[0], mask, scale)
    results = [
        attention(q, k, v, mask=mask, scale=scale),
        engines.eager(q, k, v, mask, scale),
        engines.online(q, k, v, mask, scale, block=1),
        engines.online(q, k, v, mask, scale, block=2, base2=True),
    ]
    limit = bound.limit[0]
    for y in results:
        assert (decimals.errors(y[0], exact) <= limit).all()
    assert (decimals.errors(bound.exact[0], exact) <= limit).all()
    assert not limit[~mask.any(axis=1)].any()
    assert (bound.usual <= bound.limit).all()


@given(data=st.data())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_any_numbers(dtype, data):
    """Scores that overflow or vanish, of our own."""
    q, k, v, mask, scale = data.draw(problems(dtype, max_magnitude=np.inf))
    with np.errstate(all="ignore"):
        bound = attention_bound(q, k, v, mask=mask, scale=scale)
        y = attention(q, k, v, mask=mask, scale=scale)
    assert bound.ratio(y).max() <= 1


@ALL
def test_attention_limit_is_the_formula(rng, dtype):
    """Written out for a few queries, with every rounding that may be flagged."""
    q, k, v = heads(rng, dtype, size=1.0)
    mask = causal(24)
    u, out = roundoffs(dtype)
    own = 2 if dtype == "float64" else 1
    sums = "float64" if dtype == "float64" else "float32"
    cases = [({}, None, 0.0), ({"block": 5}, None, 0.0)]
    if dtype == "bfloat16":
        cases.append(({"probabilities": dtype}, None, 2.0**-8))
        cases.append(({"scores": dtype}, dtype, 0.0))
    for options, between, rounded in cases:
        bound = attention_bound(q, k, v, mask=mask, **options)
        a = scores_bound(q, k, scale=0.125, dtype=sums, scores=between)
        blocks = -(-24 // options.get("block", 16))
        growth = math.log1p(gamma(24 + blocks, u)) - math.log1p(-gamma(24 + blocks, u))
        factor = relative(growth, 2 * math.log1p(u), math.log1p(rounded))
        for h, s, d in ((0, 1, 0), (3, 11, 17), (5, 23, 63)):
            row, errors = a.exact[0, h, s], a.limit[0, h, s]
            p, eta, r = stated_probabilities(row, errors, mask[s], u, rescalings=blocks)
            values = v[0, :, h // 3, d].astype(float)
            y = sum(p[t] * values[t] for t in p)
            first = sum(p[t] * eta[t] * abs(values[t]) for t in p) + abs(y) * r
            second = factor * sum(p[t] * (1 + eta[t]) * abs(values[t]) for t in p)
            stated = (first + second) / (1 - r) * own * (1 + out) + out * abs(y)
            close = pytest.approx(stated, rel=1e-3, abs=1.01 * TINY[dtype])
            assert bound.limit[0, s, h, d] == close


@ALL
@pytest.mark.parametrize("size", [0.1, 1.5, 8.0])
def test_attention_of_engines(rng, dtype, size):
    """In another order, online in blocks, in base 2: PASS, at flat and at steep softmaxes."""
    q, k, v = heads(rng, dtype, 70, 100, size=size)
    mask = causal(70, 100)
    bound = attention_bound(q, k, v, mask=mask)
    assert judge(attention(q, k, v, mask=mask), bound).verdict == "PASS"
    for y in (
        engines.eager(q, k, v, mask, 0.125),
        engines.online(q, k, v, mask, 0.125, block=16),
        engines.online(q, k, v, mask, 0.125, block=33, base2=True),
    ):
        assert judge(y, bound).verdict == "PASS"


@NARROW
def test_rounded_scores_and_probabilities_are_told_apart(rng, dtype):
    """transformers' eager attention rounds both, flash kernels probabilities."""
    q, k, v = heads(rng, dtype)
    mask = causal(24)
    bounds = {
        "none": attention_bound(q, k, v, mask=mask),
        "p": attention_bound(q, k, v, mask=mask, probabilities=dtype),
        "both": attention_bound(q, k, v, mask=mask, probabilities=dtype, scores=dtype),
    }
    runs = {
        "flash": engines.online(q, k, v, mask, 0.125, block=16, probabilities=dtype),
        "eager p": engines.eager(q, k, v, mask, 0.125, probabilities=dtype),
        "eager": engines.eager(q, k, v, mask, 0.125, between=dtype, probabilities=dtype),
    }
    found = {run: [judge(y, bound).verdict for bound in bounds.values()] for run, y in runs.items()}
    assert found["flash"] == found["eager p"] == ["FAIL", "PASS", "PASS"]
    assert found["eager"][0] == "FAIL"
    assert found["eager"][2] == "PASS"


def test_rounded_operands_are_told_apart(rng):
    """llama.cpp keeps keys and values in float16."""
    q, k, v = heads(rng, "float32")
    narrow = [through(a, "float16") for a in (q, k, v)]
    mask = causal(24)
    y = engines.eager(*narrow, mask, 0.125, probabilities="float16")
    assert judge(y, attention_bound(q, k, v, mask=mask)).ratio > 5
    assert judge(y, attention_bound(q, k, v, mask=mask, kv_cache="float16")).verdict == "PASS"
    assert judge(y, attention_bound(*narrow, mask=mask, kv_cache="float16")).verdict == "PASS"


def test_what_rounded_operands_excuse(rng):
    """The roundings of float16 operands are known: no error of that size is one of them."""
    q, k, v = (through(a, "float16") for a in heads(rng, "float32"))
    mask = causal(24)
    bound = attention_bound(q, k, v, mask=mask, kv_cache="float16")
    for wrong in (
        engines.eager(q * np.float32(1 + 2.0**-11), k, v, mask, 0.125),
        engines.eager(q, k, v * np.float32(1 + 2.0**-10), mask, 0.125),
    ):
        assert judge(wrong, bound).verdict == "FAIL"
    plain = attention_bound(q, k, v, mask=mask)
    sizes = attention_bound(q, k, abs(v), mask=mask).exact
    np.testing.assert_array_equal(bound.exact, plain.exact)
    np.testing.assert_allclose(bound.limit, plain.limit + 2.0**-11 * sizes, rtol=0.02, atol=5e-6)


def test_weighted_sums_kept_in_few_bits(rng):
    """Added up key by key in float16, as llama.cpp's flash attention does."""
    q, k, v = heads(rng, "float32")
    mask = causal(24)
    right = attention_bound(q, k, v, mask=mask)
    one = engines.eager(q, k, np.ones_like(v), mask, 0.125)
    np.testing.assert_allclose(one, 1, rtol=1e-5)
    sizes = attention_bound(q, k, abs(v), mask=mask).exact
    bound = attention_bound(q, k, v, mask=mask, weighted_sums="float16")
    growth = 48 * 2.0**-11 / (1 - 48 * 2.0**-11)
    np.testing.assert_allclose(bound.limit, right.limit + growth * sizes, rtol=0.01, atol=1e-5)


def test_wrong_attention_fails(rng):
    q, k, v = heads(rng, "float32")
    mask = causal(24)
    bound = attention_bound(q, k, v, mask=mask)
    hides, shows = mask.copy(), mask.copy()
    hides[20, 3], shows[11, 12] = False, True
    tiled = [np.tile(a, (1, 1, 3, 1)) for a in (k, v)]
    wrong = {
        "a key hidden": engines.eager(q, k, v, hides, 0.125),
        "a key shown": engines.eager(q, k, v, shows, 0.125),
        "window": engines.eager(q, k, v, mask & ~np.tri(24, k=-20, dtype=bool), 0.125),
        "scale": engines.eager(q, k, v, mask, 1 / math.sqrt(63)),
        "tiled heads": engines.eager(q, *tiled, mask, 0.125),
        "bfloat16 p": engines.eager(q, k, v, mask, 0.125, probabilities="bfloat16"),
        "float16 p": engines.eager(q, k, v, mask, 0.125, probabilities="float16"),
        "TF32 scores": engines.eager(tf32(q), tf32(k), v, mask, 0.125),
        "TF32 values": engines.eager(q, k, tf32(v), mask, 0.125),
        "shifted values": engines.eager(q, k, np.roll(v, 1, axis=1), mask, 0.125),
    }
    for name, y in wrong.items():
        assert judge(y, bound).ratio > 1, name


def test_huge_scores():
    """Where one key is far above the others, the sum is its value, however large the scores."""
    q = np.array([[[[300.0, 0]]]], np.float32)
    k = np.array([[300.0, 0], [299, 0], [-300, 0]], np.float32).reshape(1, 3, 1, 2)
    v = np.array([[1.0, 2], [5, 6], [7, 8]], np.float32).reshape(1, 3, 1, 2)
    bound = attention_bound(q, k, v)
    assert judge(attention(q, k, v), bound).verdict == "PASS"
    np.testing.assert_array_equal(bound.exact[0, 0, 0], [1, 2])
    assert np.isfinite(bound.limit).all()
    assert judge(v[:, 1:2], bound).verdict == "FAIL"
    # So large that the scores' roundings decide between two keys: nothing can be said.
    near = np.array([[300.0, 0], [np.nextafter(np.float32(300), 0), 0]], np.float32)
    huge = attention_bound(1e5 * q, near.reshape(1, 2, 1, 2), v[:, :2])
    assert np.isinf(huge.limit).all()


@pytest.mark.parametrize("probabilities", [None, "bfloat16"])
def test_queries_that_may_see_nothing(rng, probabilities):
    q, k, v = heads(rng, "float32", 4, 4)
    mask = causal(4)
    mask[2] = False
    bound = attention_bound(q, k, v, mask=mask, probabilities=probabilities)
    assert not bound.limit[0, 2].any()
    assert not bound.exact[0, 2].any()
    assert judge(attention(q, k, v, mask=mask), bound).verdict == "PASS"
    added = np.where(mask, 0, -1e4).astype(np.float32)
    y = engines.eager(q, k, v, np.ones((4, 4), bool), 0.125)
    assert judge(y, bound).verdict == "FAIL"
    as_zeros = attention_bound(q, k, v, mask=added)
    np.testing.assert_allclose(as_zeros.exact[0, 2], attention_bound(q, k, v).exact[0, 2])


def test_attention_of_what_is_not_finite(rng):
    q, k, v = heads(rng, "float32", 5, 5, 2, 1, 4)
    k[0, 4, 0, 1], v[0, 4, 0, 2] = np.nan, np.inf
    q[0, 3] = 3e38
    with np.errstate(all="ignore"):
        bound = attention_bound(q, k, v, mask=causal(5))
    limited = np.isfinite(bound.limit)
    assert limited[0, :3, :, [0, 1, 3]].all()
    assert not limited[0, 3:].any()
    assert not limited[..., 2].any()  # an engine may multiply the hidden value by zero


def test_overflowing_values_and_results():
    q = np.zeros((1, 1, 1, 2), np.float32)
    v = np.full((1, 3, 1, 2), 2e38, np.float32)
    k = np.zeros_like(v)
    assert np.isinf(attention_bound(q, k, v).limit).all()  # the sum, before it is normalised
    assert np.isinf(attention_bound(q, k, v / 1e33, dtype="float16").limit).all()
    assert np.isinf(attention_bound(q, k, v / 1e33, kv_cache="float16").limit).all()
    assert np.isfinite(attention_bound(q, k, v / 1e33).limit).all()


def test_tiles_do_not_change_the_bound(rng, monkeypatch):
    q, k, v = heads(rng, "float32", 30, 30)
    calls = {
        "attention": lambda: attention_bound(q, k, v, mask=causal(30)),
        "scores": lambda: scores_bound(q, k, scale=0.125),
        "probabilities": lambda: probabilities_bound(q, k, mask=causal(30), scale=0.125),
    }
    whole = {name: call() for name, call in calls.items()}
    monkeypatch.setattr(tiling, "TILE", 7 * 30 * 3)
    for name, call in calls.items():
        # Sums of some 30 terms of size 1, which may nearly cancel, in another order.
        np.testing.assert_allclose(call().exact, whole[name].exact, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(call().limit, whole[name].limit, rtol=1e-9)


def test_each_sequence_has_its_own(rng):
    q, k, v = (np.concatenate([a, a[:, ::-1]]) for a in heads(rng, "float32"))
    masks = np.stack([causal(24), np.eye(24, dtype=bool)])
    y = attention(q, k, v, mask=masks)
    assert judge(y, attention_bound(q, k, v, mask=masks)).verdict == "PASS"
    assert judge(y, attention_bound(q, k, v, mask=masks[::-1])).verdict == "FAIL"


def test_nothing_to_attend_to():
    q, k = np.ones((2, 3, 4, 2), np.float32), np.zeros((2, 0, 2, 2), np.float32)
    for mask in (None, np.zeros((3, 0), bool)):
        bound = attention_bound(q, k, k, mask=mask)
        assert bound.ratio(attention(q, k, k, mask=mask)).max() == 0
        assert probabilities_bound(q, k, mask=mask, scale=1.0).limit.shape == (2, 4, 3, 0)
    assert attention_bound(q[:, :0], q[:, :, :2], q[:, :, :2]).limit.shape == (2, 0, 4, 2)


Q, K = np.zeros((1, 2, 4, 8), np.float32), np.zeros((1, 3, 2, 8), np.float32)
P, S = np.zeros((1, 4, 2, 3), np.float32), np.zeros((2, 3), bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scores_bound(Q[0], K, scale=1.0), ValueError, r"q: .*, got \[2, 4, 8\]"),
        (lambda: scores_bound(Q, K[..., :4], scale=1.0), ValueError, r"k: .*, got \[1, 3, 2, 4\]"),
        (lambda: scores_bound(Q[..., None], K, scale=1.0), ValueError, r"q: .*, 4, 8, 1\]"),
        (lambda: scores_bound(Q, K[..., None], scale=1.0), ValueError, r"k: .*, 2, 8, 1\]"),
        (lambda: scores_bound(Q[:, :, :3], K, scale=1.0), ValueError, "k: .* divisor of q's 3"),
        (lambda: scores_bound(Q, S, scale=1.0), TypeError, "k: expected one of the dtypes"),
        (lambda: scores_bound(Q, K, scale=np.inf), ValueError, "scale: .* finite .*, got inf"),
        (lambda: scores_bound(Q, K, scale="1"), TypeError, "scale: "),
        (lambda: scores_bound(Q, K, scale=1.0, scores="x"), ValueError, "scores: .*, got 'x'"),
        (lambda: scores_bound(Q, K, scale=1.0, kv_cache="x"), ValueError, "kv_cache: .*'x'"),
        (lambda: softmax_bound(P[0]), ValueError, r"scores: .*, got \[4, 2, 3\]"),
        (lambda: softmax_bound(P, mask=[[True]]), TypeError, "mask: .* array .*, got list"),
        (lambda: attention_bound(Q, K, K, mask=[[True]]), TypeError, "mask: .* got list"),
        (lambda: probabilities_bound(Q, K, mask=[0], scale=1.0), TypeError, "mask: .* got list"),
        (lambda: softmax_bound(P, mask=S.T), ValueError, r"mask: .*\[1, 2, 3\], got \[3, 2\]"),
        (lambda: softmax_bound(P, mask=S.astype(int)), TypeError, "mask: .* got int64"),
        (lambda: probabilities_bound(Q, K, mask=S[0], scale=1.0), ValueError, "mask: "),
        (lambda: weighted_sum_bound(P[0], K), ValueError, r"probabilities: .*, got \[4, 2, 3\]"),
        (lambda: weighted_sum_bound(P, K[:, :2]), ValueError, r"v: .*, got \[1, 2, 2, 8\]"),
        (lambda: weighted_sum_bound(P, K[..., None]), ValueError, r"v: .*, got \[1, 3, 2, 8, 1\]"),
        (lambda: weighted_sum_bound(P[:, :3], K), ValueError, "v: .* a divisor of 3, got"),
        (lambda: attention_bound(Q, K, K[:, :2]), ValueError, r"v: .* of k, got \[1, 2, 2, 8\]"),
        (lambda: attention_bound(Q, K, K, mask=S.T), ValueError, "mask: "),
        (lambda: attention_bound(Q, K, K, block=0), ValueError, "block: "),
        (lambda: attention_bound(Q, K, K, probabilities="x"), ValueError, "probabilities: "),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
