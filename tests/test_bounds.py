"""The bounds against exact rational arithmetic, against correct code, and against wrong code."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import linear, rms_norm
from llama_layers.testing import arrays
from llama_layers.verify import (
    Bound,
    Judgement,
    embedding_bound,
    judge,
    linear_bound,
    rms_norm_bound,
)
from tests.support import oracle

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
FLOAT32_MAX = float(np.finfo(np.float32).max)
BFLOAT16 = ml_dtypes.bfloat16


def gamma(n, u):
    return Fraction(n) * Fraction(u) / (1 - Fraction(n) * Fraction(u))


@st.composite
def linear_problems(draw, dtype="float32", max_magnitude=1024.0):
    rows, inputs, outputs = (draw(st.integers(1, most)) for most in (2, 12, 3))
    options = {"dtype": dtype, "max_magnitude": max_magnitude}
    bias = draw(st.none() | arrays((outputs,), **options))
    return draw(arrays((rows, inputs), **options)), draw(arrays((outputs, inputs), **options)), bias


def orders(x, weight, bias, rng):
    """One dot product in float32, summed in several orders."""
    terms = [np.float32(a) * np.float32(b) for a, b in zip(x, weight, strict=True)]
    if bias is not None:
        terms.append(np.float32(bias))
    yield from (terms, terms[::-1], [terms[i] for i in rng.permutation(len(terms))])
    yield sorted(terms, key=abs)
    yield [np.float32(sum(terms[0::2], np.float32(0))), *terms[1::2]]


@given(problem=linear_problems(max_magnitude=np.inf), seed=st.integers(0, 99))
def test_linear_true_error_is_within_the_limit_in_any_order(problem, seed):
    """The error of float32 sums, computed without a rounding of its own."""
    x, weight, bias = problem
    y, _ = oracle.exact_linear(x, weight, bias)
    bound = linear_bound(x, weight, bias)
    rng = np.random.default_rng(seed)
    for row, out in np.ndindex(*y.shape):
        limit = bound.limit[row, out]
        if math.isinf(limit):
            continue
        for terms in orders(x[row], weight[out], None if bias is None else bias[out], rng):
            total = np.float32(0)
            for term in terms:
                total = np.float32(total + term)
            assert abs(Fraction(float(total)) - y[row, out]) <= Fraction(float(limit))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@given(data=st.data())
def test_linear_bias_may_follow_a_rounded_product(dtype, data):
    """What a GPU does: round the product, add the bias, round again."""
    x, weight, bias = data.draw(linear_problems(dtype, max_magnitude=np.inf))
    narrow = x.dtype
    with np.errstate(all="ignore"):
        y = linear(x, weight).astype(np.float32)
        if bias is not None:
            y = y + bias.astype(np.float32)
        assert (linear_bound(x, weight, bias).ratio(y.astype(narrow)) <= 1).all()


def test_linear_bias_may_take_away_a_rounded_product():
    """257 is rounded to 256, and what the bias leaves of it is 0 in the place of 1."""
    ones = np.ones((1, 257), BFLOAT16)
    bound = linear_bound(ones, ones, np.array([-256], BFLOAT16))
    assert bound.ratio(np.array([[1.0]])) == 0
    assert 0.9 < bound.ratio(np.array([[0.0]])) <= 1


@given(data=st.data(), eps=st.sampled_from([1e-5, 1e-6, 1.0]))
def test_rms_norm_true_error_is_within_the_limit(data, eps):
    hidden = data.draw(st.integers(1, 12))
    x = data.draw(arrays((1, hidden), max_magnitude=2.0**60))
    weight = data.draw(arrays((hidden,)))
    bound = rms_norm_bound(x, weight, eps=eps)
    y = rms_norm(x, weight, eps=eps)
    squares = sum(number * number for number in oracle.exact(x[0]))
    root = oracle.exact_square_root(squares / hidden + Fraction(eps))
    for i in range(hidden):
        exact = Fraction(float(x[0, i])) * Fraction(float(weight[i])) / root
        error = abs(Fraction(float(y[0, i])) - exact)
        assert error <= Fraction(float(bound.limit[0, i])) + abs(exact) / 2**52


def test_usual_is_four_root_n_u():
    """And never more than the limit: up to n = 16, gamma_n is the smaller one."""
    for n in (4, 16, 17, 1024):
        bound = linear_bound(np.ones((1, n), np.float32), np.ones((1, n), np.float32))
        usual = n * min(4 * math.sqrt(n) * 2.0**-24, float(gamma(n, 2.0**-24)))
        assert bound.usual[0, 0] == pytest.approx(usual, rel=1e-6)
        assert bound.usual[0, 0] <= bound.limit[0, 0]


def test_verdicts_fall_at_the_two_limits():
    n = 1024
    x = np.full((1, n), 2.0, np.float32)
    bound = linear_bound(x, x, dtype="float32")
    usual, limit = 4.0 * n * 4 * math.sqrt(n) * 2.0**-24, 4.0 * n * float(gamma(n, 2.0**-24))
    for error, verdict in (
        (0.0, "PASS"),
        (0.99 * usual, "PASS"),
        (1.01 * usual, "WARN"),
        (0.99 * limit, "WARN"),
        (1.01 * limit, "FAIL"),
        (math.inf, "FAIL"),
        (math.nan, "FAIL"),
    ):
        assert judge(np.array([[4.0 * n - error]]), bound).verdict == verdict


def test_ratio_of_each_kind():
    nan, inf = math.nan, math.inf
    exact = np.array([1.0, 1, 1, 1, nan, nan, inf, inf, inf, 0, 0, 1, 1])
    limit = np.array([0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 0, 0, inf, inf])
    computed = np.array([1.0, 1.25, nan, inf, nan, 0, inf, -inf, 1, 0, 1e-40, nan, 7])
    expected = [0, 0.5, inf, inf, 0, inf, 0, inf, inf, 0, inf, 0, 0]
    np.testing.assert_array_equal(Bound(exact, limit, limit).ratio(computed), expected)
    np.testing.assert_array_equal(Bound(exact, 2 * limit, limit).usual_ratio(computed), expected)


def test_nothing_is_allowed_where_every_product_is_zero():
    x = np.array([[0, 5, 0]], np.float32)
    weight = np.array([[3, 0, 3], [0, 1, 0]], np.float32)
    limit = linear_bound(x, weight).limit
    assert limit[0, 0] == 0 < limit[0, 1]
    norm = rms_norm_bound(np.array([[0, 1]], np.float32), np.array([1, 0], np.float32), eps=1e-5)
    np.testing.assert_array_equal(norm.limit, [[0, 0]])


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_nothing_is_said_where_overflow_is_possible(eps):
    big = np.full((1, 2), FLOAT32_MAX, np.float32)
    weight = np.array([[1, -1], [0.25, 0.25]], np.float32)
    bound = linear_bound(big, weight)
    assert np.isinf(bound.limit[0, 0])  # the partial sums may overflow, though y is 0
    assert np.isfinite(bound.limit[0, 1])
    assert np.isinf(linear_bound(np.array([[300]], "f2"), np.array([[300]], "f2")).limit).all()
    assert np.isinf(rms_norm_bound(big, np.ones(2, np.float32), eps=eps).limit).all()


def test_nothing_is_said_where_a_rounded_product_may_overflow():
    """60000 + 60000 - 60000 fits float16; a product rounded before the bias is added does not."""
    x, weight = np.array([[300, 300]], "f2"), np.array([[200, 200]], "f2")
    assert np.isinf(linear_bound(x, weight, np.array([-60000], "f2")).limit).all()


def test_nothing_is_said_of_a_norm_whose_squares_underflow():
    """Without eps the root may be zero: x / 0 is Inf, and 0 / 0 or Inf times a zero weight NaN."""
    x = np.array([[1e-30, 0]], np.float32)
    for weight in ([1, 1], [0, 1]):
        bound = rms_norm_bound(x, np.array(weight, np.float32), eps=0.0)
        assert np.isinf(bound.limit).all()


def test_flushing_engines():
    """Products and inputs below the smallest normal number may come out as zero."""
    x = np.array([[2.0**-70, 2.0**-130]], np.float32)
    weight = np.array([[2.0**-70, 2.0**20]], np.float32)
    flushed = np.zeros((1, 1), np.float32)
    assert linear_bound(x, weight).ratio(flushed) > 1
    assert linear_bound(x, weight, flushes=True).ratio(flushed) <= 1
    small = np.full((1, 4), 2.0**-127, np.float32)
    one, flushed = np.ones(4, np.float32), np.zeros((1, 4), np.float32)
    assert (rms_norm_bound(small, one, eps=1e-6).ratio(flushed) > 1).all()
    assert (rms_norm_bound(small, one, eps=1e-6, flushes=True).ratio(flushed) <= 1).all()
    ones = np.ones((1, 4), np.float32)
    assert (rms_norm_bound(ones, small[0], eps=1e-6, flushes=True).ratio(flushed) <= 1).all()


def test_formats_may_be_stated():
    """bfloat16 numbers held in float32 arrays, with float32 sums, for an engine's output."""
    x, weight = np.ones((1, 64), np.float32), np.ones((1, 64), np.float32)
    float32, bfloat16 = linear_bound(x, weight), linear_bound(x, weight, dtype="bfloat16")
    assert bfloat16.limit[0, 0] == pytest.approx(float32.limit[0, 0] + 64 * 2.0**-8, rel=1e-2)
    coarse = linear_bound(x, weight, accumulate="float16").limit[0, 0]
    assert coarse == pytest.approx(64 * float(gamma(64, 2.0**-11)), rel=1e-2)
    norm = rms_norm_bound(x, weight[0], eps=1e-5, dtype="bfloat16").limit[0, 0]
    assert norm == pytest.approx(2.0**-8, rel=1e-2)


def wrong_products(x, weight):
    """Matrix products in less precision than they claim, with the format that they claim."""
    narrow_x, narrow_w = x.astype(BFLOAT16), weight.astype(BFLOAT16)
    exact = narrow_x.astype(np.float64) @ narrow_w.astype(np.float64).T
    total = np.zeros(exact.shape, BFLOAT16)
    for i in range(x.shape[1]):
        terms = narrow_x[:, i, None].astype(np.float32) * narrow_w[None, :, i].astype(np.float32)
        total = (total.astype(np.float32) + terms).astype(BFLOAT16)
    yield "bfloat16 sums", narrow_x, narrow_w, total
    truncated = exact.astype(np.float32).view(np.uint32) >> 16 << 16
    yield "truncated output", narrow_x, narrow_w, truncated.view(np.float32).astype(BFLOAT16)
    yield "bfloat16 inputs", x, weight, exact
    yield "float16 weight", x, weight, x.astype(np.float64) @ weight.astype("f2").astype(float).T
    tf32 = [(a.view(np.uint32) + 0x1000 >> 13 << 13).view(np.float32) for a in (x, weight)]
    yield "TF32", x, weight, tf32[0].astype(np.float64) @ tf32[1].astype(np.float64).T


def test_less_precision_than_claimed_fails(rng):
    x = rng.standard_normal((8, 64)).astype(np.float32)
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    for name, stored_x, stored_weight, computed in wrong_products(x, weight):
        assert judge(computed, linear_bound(stored_x, stored_weight)).verdict == "FAIL", name


X, W = np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_bound(X, W.T), ValueError, r"weight: expected shape \[N, K\] .*\[3, 4\]"),
        (lambda: linear_bound(X, W, W), ValueError, r"bias: expected shape \[4\], got \[4, 3\]"),
        (lambda: linear_bound(X.astype(int), W), TypeError, "x: expected one of the dtypes"),
        (lambda: linear_bound(X, W, dtyp="float16"), TypeError, "dtyp: no such keyword"),
        (lambda: linear_bound(X, W, name="float16"), TypeError, "name: no such keyword"),
        (lambda: linear_bound(X, W.astype(int)), TypeError, "weight: expected one of the dtypes"),
        (lambda: linear_bound(X, W, [1.0]), TypeError, "bias: expected an array .*, got list"),
        (lambda: linear_bound([1.0], W), TypeError, "x: expected an array, got list"),
        (lambda: linear_bound(X, [1.0]), TypeError, "weight: expected an array, got list"),
        (lambda: embedding_bound([0], W), TypeError, "ids: expected an array .*, got list"),
        (lambda: linear_bound(X, W, accumulate=np.float32), TypeError, "accumulate: .* name of"),
        (lambda: linear_bound(X, W, dtype="int8"), ValueError, "dtype: .*float16.*, got 'int8'"),
        (lambda: linear_bound(X, W, accumulate="x"), ValueError, "accumulate: .*, got 'x'"),
        (lambda: rms_norm_bound(X, W, eps=1.0), ValueError, r"weight: .*\[H\].*, got \[4, 3\]"),
        (lambda: rms_norm_bound(X, W[0], eps=1.0, dtype="f4"), ValueError, "dtype: .*, got 'f4'"),
        (lambda: linear_bound(X, W).ratio(X), ValueError, r"computed: .* \[2, 4\], got \[2, 3\]"),
        (lambda: linear_bound(X, W).ratio(np.zeros((2, 4), int)), TypeError, "computed: .* int64"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_few_bits_keep_a_usual_bound():
    """256 sums in bfloat16 can lose everything, but usually do not: garbage is not as usual."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 256)), rng.standard_normal((8, 256))
    bound = linear_bound(x, w, dtype="bfloat16", accumulate="bfloat16")
    assert np.isinf(bound.limit).all()
    assert np.isfinite(bound.usual).all()
    assert judge(np.full((4, 8), 1e30), bound).verdict == "WARN"
    assert judge(x @ w.T, bound).verdict == "PASS"


def test_nothing_judged_is_no_pass():
    x, w = np.full((1, 4), 1e30, np.float32), np.full((2, 4), 1e30, np.float32)
    judgement = judge(np.full((1, 2), 7.0), linear_bound(x, w))
    assert (judgement.unjudged, judgement.of, judgement.verdict) == (2, 2, "WARN")
    assert judge(np.full((1, 1), 7.0), linear_bound(x, w[:1])).verdict == "WARN"
    empty = judge(np.zeros((0, 2)), linear_bound(np.zeros((0, 4)), np.zeros((2, 4))))
    assert empty == Judgement(0.0, 0.0, (), unjudged=0, of=0)
    assert empty.verdict == "PASS"


def test_a_float64_result_is_not_held_against_itself():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 300)), rng.standard_normal((5, 300))
    ratio = judge(x @ w.T, linear_bound(x, w)).ratio
    assert 0 < ratio < 1


def test_judge_needs_a_bound():
    with pytest.raises(TypeError, match="bound: expected a Bound, got ndarray"):
        judge(np.zeros(2), np.zeros(2))
