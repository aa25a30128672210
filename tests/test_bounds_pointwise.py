"""Bounds of embeddings, gates and residuals, and of a norm that rounds its row."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import geglu, rms_norm, swiglu
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import arrays
from llama_layers.verify import (
    embedding_bound,
    geglu_bound,
    judge,
    residual_bound,
    rms_norm_bound,
    swiglu_bound,
)
from tests.support import decimals, engines, oracle
from tests.support.engines import DTYPES, through, wide

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
ALL = pytest.mark.parametrize("dtype", DTYPES)
NARROW = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@ALL
def test_rows_of_a_table_are_exact(rng, dtype):
    table = rng.standard_normal((5, 3)).astype(DTYPES[dtype])
    ids = np.array([[4, 0], [1, 1]])
    bound = embedding_bound(ids, table)
    assert bound.limit.max() == bound.usual.max() == 0
    assert judge(table[ids], bound).verdict == "PASS"
    assert judge(table[ids[:, ::-1]], bound).verdict == "FAIL"


def test_rows_that_do_not_fit_are_rounded():
    """Those that fit are copied: 3 and 0 are bfloat16 numbers."""
    table = np.array([[1 + 2.0**-9, 3.0, 1e-40, 3.4e38, 0.0]], np.float32)
    bound = embedding_bound(np.array([0]), table, dtype="bfloat16")
    stated = [2.0**-8 * (1 + 2.0**-9), 0, 2.0**-8 * 1e-40 + 2.0**-133, np.inf, 0]
    np.testing.assert_allclose(bound.limit, [stated], rtol=1e-6)
    assert (embedding_bound(np.array([0]), table, dtype="float64").limit == 0).all()


@ALL
@given(data=st.data())
def test_residual_true_error_is_within_the_limit(dtype, data):
    """Rounded once, or to the sums' format first."""
    options = {"dtype": dtype, "max_magnitude": np.inf}
    a, b = data.draw(arrays((6,), **options)), data.draw(arrays((6,), **options))
    bound = residual_bound(a, b)
    with np.errstate(over="ignore"):
        for y in (a + b, (a.astype(wide(dtype)) + b.astype(wide(dtype))).astype(a.dtype)):
            for i, exact in enumerate(oracle.exact(a) + oracle.exact(b)):
                if np.isfinite(bound.limit[i]):
                    assert abs(Fraction(float(y[i])) - exact) <= Fraction(float(bound.limit[i]))


@ALL
def test_residual_off_by_two_ulps_fails(rng, dtype):
    a, b = (rng.standard_normal(64).astype(DTYPES[dtype]) for _ in range(2))
    y = (a.astype(np.float64) + b.astype(np.float64)).astype(DTYPES[dtype])
    ulps = np.abs(y.astype(np.float64)) * 4 * ROUNDOFF[dtype]
    bound = residual_bound(a, b)
    assert judge(y, bound).ratio <= 1
    assert (bound.ratio(y.astype(np.float64) + 1.01 * ulps) > 1).all()


def test_what_cancels_or_overflows():
    huge = np.array([1.7e308])
    assert np.isinf(residual_bound(huge, huge).limit).all()
    assert np.isinf(swiglu_bound(huge, huge).limit).all()
    row = np.array([1e100, 0])
    assert np.isinf(rms_norm_bound(row, np.repeat(huge, 2), eps=1.0).limit[0])
    a = np.array([1.5, 3e38, np.inf, np.nan, np.inf], np.float32)
    b = np.array([-1.5, 3e38, 1, 1, -np.inf], np.float32)
    bound = residual_bound(a, b)
    assert bound.limit[0] == 0
    assert bound.limit[1] == np.inf
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(bound.ratio(a + b), 0)
    np.testing.assert_array_equal(bound.ratio(np.zeros(5, np.float32))[2:], np.inf)


@ALL
@given(data=st.data())
def test_swiglu_true_error_is_within_the_limit(dtype, data):
    """In each form, against decimals."""
    gate = data.draw(arrays((8,), dtype=dtype, max_magnitude=600.0))
    up = data.draw(arrays((8,), dtype=dtype, max_magnitude=64.0))
    bound = swiglu_bound(gate, up)
    exact = np.array([decimals.silu(g) for g in decimals.decimals(gate)])
    exact = exact * decimals.decimals(up)
    for name, silu in engines.gate_forms(gate.astype(wide(dtype))):
        with np.errstate(over="ignore"):
            y = (silu * up.astype(silu.dtype)).astype(gate.dtype)
        error = decimals.errors(y, exact)
        assert (error <= bound.limit + 0.0).all(), name
    assert (decimals.errors(swiglu(gate, up), exact) <= bound.limit).all()


@ALL
@given(data=st.data())
def test_geglu_true_error_is_within_the_limit(dtype, data):
    """In each form, against decimals."""
    gate = data.draw(arrays((8,), dtype=dtype, max_magnitude=600.0))
    up = data.draw(arrays((8,), dtype=dtype, max_magnitude=64.0))
    bound = geglu_bound(gate, up)
    exact = np.array([decimals.gelu(g) for g in decimals.decimals(gate)])
    exact = exact * decimals.decimals(up)
    for name, gelu in engines.gelu_forms(gate.astype(wide(dtype))):
        y = (gelu * up.astype(gelu.dtype)).astype(gate.dtype)
        assert (decimals.errors(y, exact) <= bound.limit + 0.0).all(), name
    assert (decimals.errors(geglu(gate, up), exact) <= bound.limit).all()


@ALL
def test_geglu_limit_is_small(rng, dtype):
    """Some units of the gate's size, since a tangent's error counts in full, and one rounding."""
    gate, up = (4 * rng.standard_normal((2, 500))).astype(DTYPES[dtype])
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    out = ROUNDOFF[dtype] if dtype in engines.NARROW else 0.0
    bound = geglu_bound(gate, up)
    size = abs(gate.astype(np.float64) * up.astype(np.float64))
    doubled = 2 if dtype == "float64" else 1
    stated = doubled * 40 * u * size + out * abs(bound.exact) + 4 * TINY[dtype]
    assert (bound.limit <= 1.01 * stated).all()
    assert judge(swiglu(gate, up), bound).verdict == "FAIL"


@NARROW
def test_geglu_that_rounds_gelu_is_told_apart(rng, dtype):
    gate, up = (rng.standard_normal(2000).astype(DTYPES[dtype]) for _ in range(2))
    (_, gelu), *_ = engines.gelu_forms(gate.astype(np.float32))
    y = (through(gelu, dtype) * up.astype(np.float32)).astype(gate.dtype)
    assert judge(y, geglu_bound(gate, up)).verdict == "FAIL"
    assert judge(y, geglu_bound(gate, up, silu=dtype)).verdict == "PASS"


@ALL
def test_swiglu_limit_is_the_formula(rng, dtype):
    gate = (4 * rng.standard_normal(100)).astype(DTYPES[dtype])
    up = rng.standard_normal(100).astype(DTYPES[dtype])
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    out = ROUNDOFF[dtype] if dtype in engines.NARROW else 0.0
    g, h = gate.astype(np.float64), up.astype(np.float64)
    y = g * h / (1 + np.exp(-g))
    for ulps in (4.0, 1.0):
        # The first order of it, which the others are far below.
        once = (4 * u + 2 * u * ulps) * abs(y) + u * ulps * abs(g * h)
        stated = once * (2 if dtype == "float64" else 1) + out * abs(y)
        bound = swiglu_bound(gate, up, exp_ulps=ulps)
        tolerance = 1e-2 if out else 1e-5
        np.testing.assert_allclose(bound.limit, stated, rtol=tolerance, atol=4 * TINY[dtype])


@NARROW
def test_swiglu_that_rounds_silu_is_told_apart(rng, dtype):
    gate, up = (rng.standard_normal(2000).astype(DTYPES[dtype]) for _ in range(2))
    g = gate.astype(np.float32)
    y = (through(g / (1 + np.exp(-g)), dtype) * up.astype(np.float32)).astype(gate.dtype)
    assert judge(y, swiglu_bound(gate, up)).verdict == "FAIL"
    assert judge(y, swiglu_bound(gate, up, silu=dtype)).verdict == "PASS"
    twice = judge(y, swiglu_bound(gate, up, silu=dtype)).ratio
    assert twice > 0.5  # the roundings are allowed once


def stepwise(gate, up, dtype):
    """gate * 1 / (1 + exp(-gate)) * up, the result of each operation rounded."""
    g = gate.astype(np.float32)
    with np.errstate(over="ignore"):
        sums = through(1 + through(np.exp(-g), dtype), dtype)
        silu = through(g * through(1 / sums, dtype), dtype)
        return (silu * up.astype(np.float32)).astype(gate.dtype)


@NARROW
@given(data=st.data())
def test_swiglu_in_rounded_steps_is_within_the_limit(dtype, data):
    gate = data.draw(arrays((8,), dtype=dtype, max_magnitude=600.0))
    up = data.draw(arrays((8,), dtype=dtype, max_magnitude=64.0))
    bound = swiglu_bound(gate, up, sigmoid=dtype, silu=dtype)
    exact = np.array([decimals.silu(g) for g in decimals.decimals(gate)])
    errors = decimals.errors(stepwise(gate, up, dtype), exact * decimals.decimals(up))
    assert (errors <= bound.limit + 0.0).all()


@NARROW
def test_swiglu_in_rounded_steps_is_told_apart(rng, dtype):
    gate, up = (rng.standard_normal(100_000).astype(DTYPES[dtype]) for _ in range(2))
    y = stepwise(gate, up, dtype)
    assert judge(y, swiglu_bound(gate, up, silu=dtype)).verdict == "FAIL"
    judged = judge(y, swiglu_bound(gate, up, sigmoid=dtype, silu=dtype))
    assert judged.verdict == "PASS"
    assert judged.ratio > 0.65  # each rounding is allowed once


@NARROW
def test_limit_of_swiglu_in_rounded_steps(dtype):
    """Sum, quotient, two products, and as much of the exponential as it is of the sum."""
    gate = np.array([-4, -2, 0.5, 2, 8], DTYPES[dtype])
    bound = swiglu_bound(gate, np.ones_like(gate), sigmoid=dtype, silu=dtype)
    g = gate.astype(np.float64)
    roundings = 4 + 1 / (1 + np.exp(g))
    np.testing.assert_allclose(
        bound.limit, ROUNDOFF[dtype] * roundings * abs(g / (1 + np.exp(-g))), rtol=0.03
    )


def test_sigmoids_whose_exponential_overflows():
    gate = np.array([-10.5, -11.5, -600], np.float16)
    up = np.full(3, 3000, np.float16)
    bound = swiglu_bound(gate, up, sigmoid="float16")
    y = stepwise(gate, up, "float16")
    assert (y == 0).tolist() == [False, True, True]
    assert (bound.ratio(y) <= 1).all()
    assert (bound.ratio(-y) > 1).tolist() == [True, False, False]
    assert bound.limit[1] < 1.2 * abs(bound.exact[1])


def test_wrong_gates_fail(rng):
    gate, up = (rng.standard_normal(500).astype(np.float32) for _ in range(2))
    bound = swiglu_bound(gate, up)
    x = gate.astype(np.float64)
    wrong = {
        "swapped": up / (1 + np.exp(-up.astype(np.float64))) * gate,
        "quick gelu": x / (1 + np.exp(-1.702 * x)) * up,
        "tanh gelu": 0.5 * x * (1 + np.tanh(0.79788456 * (x + 0.044715 * x**3))) * up,
        "bfloat16 claimed float32": through(gate, "bfloat16") / (1 + np.exp(-gate)) * up,
    }
    for name, y in wrong.items():
        assert judge(y, bound).ratio > 100, name


def test_swiglu_at_the_ends_of_the_range():
    inf, nan = np.inf, np.nan
    gate = np.array([0, 1, -1e4, 3e38, inf, -inf, nan, 1], np.float32)
    up = np.array([5, 0, 2, 2, 1, 1, 1, inf], np.float32)
    bound = swiglu_bound(gate, up)
    np.testing.assert_array_equal(bound.limit[:2], 0)
    np.testing.assert_array_equal(bound.limit[3:6], inf)
    assert bound.ratio(np.float32([0, 0, -0.0, inf, 1, 2, nan, inf])).max() == 0
    assert (bound.ratio(np.zeros(8, np.float32))[6:] == inf).all()


def test_swiglu_that_flushes():
    gate, up = np.float32([2.0**-127, 8, -86.5]), np.float32([1, 2.0**-130, 2.0**-3])
    flushed = np.zeros(3, np.float32)
    assert (swiglu_bound(gate, up, exp_ulps=0.0).ratio(flushed) > 1).all()
    assert (swiglu_bound(gate, up, exp_ulps=0.0, flushes=True).ratio(flushed) <= 1).all()


@NARROW
def test_norm_that_rounds_its_row_is_told_apart(rng, dtype):
    x = rng.standard_normal((30, 64)).astype(DTYPES[dtype])
    weight = (1 + 0.3 * rng.standard_normal(64)).astype(DTYPES[dtype])
    y = engines.rms_norm(x, weight, 1e-5, normed=dtype)
    assert judge(y, rms_norm_bound(x, weight, eps=1e-5)).verdict == "FAIL"
    allowed = rms_norm_bound(x, weight, eps=1e-5, norm_before_weight=dtype)
    assert judge(y, allowed).verdict == "PASS"
    assert judge(y, allowed).ratio > 0.8
    plain = engines.rms_norm(x, weight, 1e-5)
    assert judge(plain, rms_norm_bound(x, weight, eps=1e-5)).verdict == "PASS"


@ALL
@given(data=st.data())
def test_norm_with_an_offset_is_within_the_limit(dtype, data):
    """Against exact roots; weights near -1 cancel."""
    x, weight = (data.draw(arrays((5,), dtype=dtype, max_magnitude=64.0)) for _ in range(2))
    weight[:2] = np.array([-1 + 2.0**-7, -1]).astype(weight.dtype)
    bound = rms_norm_bound(x, weight, eps=1e-5, offset=1)
    y = rms_norm(x, weight, eps=1e-5, offset=1)
    numbers, weights = oracle.exact(x), oracle.exact(weight)
    root = oracle.exact_square_root(sum(n * n for n in numbers) / 5 + Fraction(1e-5))
    for i in range(5):
        true = numbers[i] * (weights[i] + 1) / root
        assert abs(Fraction(float(y[i])) - true) <= Fraction(float(bound.limit[i]))
    assert y[1] == bound.limit[1] == 0


def test_norms_of_other_weights_fail(rng):
    x, weight = rng.standard_normal((2, 3, 64)).astype(np.float32)
    y = rms_norm(x, weight[0], eps=1e-5, offset=1)
    assert judge(y, rms_norm_bound(x, weight[0], eps=1e-5, offset=1)).verdict == "PASS"
    assert judge(y, rms_norm_bound(x, weight[0], eps=1e-5)).verdict == "FAIL"
    none = rms_norm_bound(x, None, eps=1e-5, offset=1)
    assert judge(rms_norm(x, None, eps=1e-5), none).verdict == "PASS"
    assert judge(y, none).verdict == "FAIL"


def test_norm_with_another_eps_fails(rng):
    """1e-5 for 1e-6, of rows as models have them."""
    x = rng.standard_normal((30, 64)).astype(np.float32)
    weight = np.ones(64, np.float32)
    y = engines.rms_norm(x, weight, 1e-5)
    assert judge(y, rms_norm_bound(x, weight, eps=1e-5)).verdict == "PASS"
    assert judge(y, rms_norm_bound(x, weight, eps=1e-6)).verdict == "FAIL"


@pytest.mark.parametrize("width", [1, 16, 300])
def test_a_float64_norm_is_not_held_against_itself(rng, width):
    """Against exact roots: what `exact` is off by counts too."""
    x, weight = rng.standard_normal((4, width)), rng.standard_normal(width)
    bound = rms_norm_bound(x, weight, eps=1e-5)
    for row in range(4):
        squares = sum(number * number for number in oracle.exact(x[row]))
        root = oracle.exact_square_root(squares / width + Fraction(1e-5))
        for i in range(width):
            true = Fraction(float(x[row, i])) * Fraction(float(weight[i])) / root
            off = abs(Fraction(float(bound.exact[row, i])) - true)
            assert off <= Fraction(float(bound.limit[row, i])) / 2


def test_formats_that_hold_the_sums_round_nothing(rng):
    x, weight = rng.standard_normal((3, 16)).astype(np.float32), np.ones(16, np.float32)
    for form in ("float32", "float64"):
        norm = rms_norm_bound(x, weight, eps=1e-5)
        flagged = rms_norm_bound(x, weight, eps=1e-5, norm_before_weight=form)
        np.testing.assert_array_equal(norm.limit, flagged.limit)
        np.testing.assert_array_equal(swiglu_bound(x, x).limit, swiglu_bound(x, x, silu=form).limit)


X = np.zeros((2, 3), np.float32)
IDS = np.array([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: embedding_bound(IDS, X[0]), ValueError, r"table: .*\[N, H\], got \[3\]"),
        (lambda: embedding_bound(X, X), TypeError, "ids: expected an integer dtype, got float32"),
        (lambda: embedding_bound(IDS + 1, X), ValueError, "ids: .* 0 to 1, got 1 to 2"),
        (lambda: embedding_bound(-IDS, X), ValueError, "ids: .* 0 to 1, got -1 to 0"),
        (lambda: embedding_bound(IDS, IDS), TypeError, "table: expected one of the dtypes"),
        (lambda: embedding_bound(IDS, X, dtype="x"), ValueError, "dtype: .*, got 'x'"),
        (lambda: residual_bound(X, X[0]), ValueError, r"added: .*\[2, 3\] of x, got \[3\]"),
        (lambda: residual_bound(X, IDS), TypeError, "added: expected one of the dtypes"),
        (lambda: swiglu_bound(X, X[0]), ValueError, r"up: .*\[2, 3\] of gate, got \[3\]"),
        (lambda: swiglu_bound(X, X, silu="x"), ValueError, "silu: .*, got 'x'"),
        (
            lambda: rms_norm_bound(X, X[0], eps=1.0, norm_before_weight="x"),
            ValueError,
            "norm_before_weight: .*, got 'x'",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_libraries_arrays(backend, rng):
    """Any library's arrays, as `llama_layers.linear` takes them."""
    x = rng.standard_normal((2, 4)).astype(np.float32)
    a = backend.array(x)
    np.testing.assert_array_equal(residual_bound(a, a).exact, 2 * to_numpy(a).astype(float))
