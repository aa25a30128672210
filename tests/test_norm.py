"""`rms_norm`: values, closed forms, dtypes, what it refuses."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import rms_norm
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import arrays, assert_same_bits, assert_within_bound
from llama_layers.verify import rms_norm_bound
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("bodies")

EPS = st.sampled_from([1e-5, 1e-6, 1.0, 0.0])


@st.composite
def problems(draw, dtype="float32", weight_dtype="float32", max_magnitude=1024.0, eps=EPS):
    """Some x [rows, H], a weight [H], and eps."""
    rows, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    x = draw(arrays((rows, hidden), dtype=dtype, max_magnitude=max_magnitude))
    weight = draw(arrays((hidden,), dtype=weight_dtype, max_magnitude=max_magnitude))
    return x, weight, draw(eps)


def run(backend, x, weight, eps):
    """The result on a backend, as a NumPy array."""
    x = backend.array(x)
    with np.errstate(all="ignore"):
        y = rms_norm(x, backend.array(weight), eps=eps)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert backend.holds(y)
    return to_numpy(y)


def assert_like_naive(y, x, weight, eps):
    bound = rms_norm_bound(x, weight, eps=eps)
    if eps:
        exact = oracle.rms_norm(x, weight, eps)
        np.testing.assert_allclose(bound.exact, exact, rtol=(x.shape[-1] + 8) * 2.0**-52)
        assert np.isfinite(y[np.isfinite(bound.limit)]).all()
    assert_within_bound(y, bound)


@given(problem=problems())
def test_within_bound_of_naive_loops(backend, problem):
    assert_like_naive(run(backend, *problem), *problem)


@given(problem=problems(max_magnitude=np.inf))
def test_within_bound_at_every_magnitude(backend, problem):
    assert_like_naive(run(backend, *problem), *problem)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        ("float32", "bfloat16"),
        ("float32", "float16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float16"),
        ("float64", "float32"),
        ("float64", "float64"),
    ],
)
@given(data=st.data())
def test_within_bound_in_every_format(dtype, weight_dtype, data):
    x, weight, eps = data.draw(problems(dtype, weight_dtype, 2.0**100))
    with np.errstate(all="ignore"):
        y = rms_norm(x, weight, eps=eps)
    assert y.dtype == x.dtype
    assert_like_naive(y, x, weight, eps)


@pytest.mark.parametrize("value", [1e-3, 0.5, 3.0, 1e4])
def test_constant_row_becomes_signed_ones(backend, value):
    """c / sqrt(c**2 + eps) is the sign of c where eps is nothing beside c**2."""
    x = np.full((2, 64), value, np.float32)
    x[1] *= -1
    weight = np.linspace(-2, 2, 64, dtype=np.float32)
    y = run(backend, x, weight, 1e-20)
    np.testing.assert_allclose(y, [weight, -weight], rtol=70 * 2.0**-24)


def test_root_mean_square_of_the_result_is_one(backend, rng):
    """For a weight of ones, whatever the mean: a norm that subtracts it fails here."""
    x = rng.standard_normal((3, 200)).astype(np.float32) + np.float32(5)
    y = run(backend, x, np.ones(200, np.float32), 1e-12).astype(np.float64)
    np.testing.assert_allclose(np.sqrt(np.mean(y * y, axis=-1)), 1, rtol=1e-5)
    assert (y.mean(axis=-1) > 0.9).all()


@given(problem=problems(eps=st.just(0.0)), exponent=st.integers(-10, 10))
def test_scaling_a_row_by_a_power_of_two_changes_no_bit(backend, problem, exponent):
    """With eps = 0 every operation scales exactly, if nothing underflows."""
    x, weight, _ = problem
    x = np.where(abs(x) < 2.0**-40, np.float32(1), x)
    scaled = x * np.float32(2.0**exponent)
    assert_same_bits(run(backend, x, weight, 0.0), run(backend, scaled, weight, 0.0))


@given(problem=problems(), exponent=st.integers(-10, 10))
def test_linear_in_the_weight(backend, problem, exponent):
    x, weight, eps = problem
    eps = eps or 1e-5
    weight = np.where(abs(weight) < 2.0**-40, np.float32(0), weight)
    factor = np.float32(2.0**exponent)
    bound = rms_norm_bound(x, weight, eps=eps)
    other = rms_norm_bound(x, weight * factor, eps=eps)
    oracle.assert_apart_at_most(
        run(backend, x, weight * factor, eps),
        run(backend, x, weight, eps).astype(np.float64) * factor,
        bound.limit * factor + other.limit,
    )


@given(problem=problems())
def test_odd(backend, problem):
    """The negative row gives the negative result, bit for bit."""
    x, weight, eps = problem
    eps = eps or 1e-5
    assert_same_bits(run(backend, -x, weight, eps), -run(backend, x, weight, eps))


def test_eps_stands_under_the_root(backend):
    """Where x**2 is nothing beside eps, y = x / sqrt(eps); outside the root it would be x / eps."""
    x = np.array([[1e-9, -2e-9, 3e-9]], np.float32)
    y = run(backend, x, np.ones(3, np.float32), 1e-4)
    np.testing.assert_allclose(y, x * 100.0, rtol=1e-6)


def test_eps_is_the_one_given(backend):
    """x = 1 and eps = 3 give 1 / 2."""
    assert run(backend, np.ones((1, 5), np.float32), np.ones(5, np.float32), 3.0)[0, 0] == 0.5


def test_row_of_zeros_stays_zero(backend):
    x = np.array([[0.0, -0.0, 0.0]], np.float32)
    assert_same_bits(run(backend, x, np.ones(3, np.float32), 1e-5), x)


def test_float16_squares_may_exceed_float16():
    """300**2 is beyond float16, and float32 arithmetic does not mind."""
    x = np.full((1, 8), 300, np.float16)
    np.testing.assert_array_equal(rms_norm(x, np.ones(8, np.float16), eps=1e-5), np.ones((1, 8)))


def test_bfloat16_mean_is_kept_in_float32():
    """4096 squares of one have mean 1; summed in bfloat16 they would stop at 256."""
    ones = np.ones((1, 4096), ml_dtypes.bfloat16)
    assert (rms_norm(ones, ones[0], eps=1e-5) == 1).all()


def test_rounds_to_the_dtype_of_x_once(rng):
    """Not a second time before the weight is applied, as some implementations do."""
    bfloat16 = ml_dtypes.bfloat16
    x = rng.standard_normal((4, 64)).astype(bfloat16)
    weight = rng.standard_normal(64).astype(np.float32)
    bound = rms_norm_bound(x, weight, eps=1e-5)
    assert_within_bound(rms_norm(x, weight, eps=1e-5), bound)
    twice = (oracle.rms_norm(x, np.ones(64), 1e-5).astype(bfloat16) * weight).astype(bfloat16)
    with pytest.raises(AssertionError, match="FAIL"):
        assert_within_bound(twice, bound)


@given(problem=problems(), data=st.data(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_nonfinite_row_stays_in_its_row(backend, problem, data, value):
    x, weight, eps = problem
    eps = eps or 1e-5
    row = data.draw(st.integers(0, x.shape[0] - 1))
    place = row, data.draw(st.integers(0, x.shape[1] - 1))
    x[place] = value
    y = run(backend, x, weight, eps)
    assert np.isnan(y[place])
    assert np.isfinite(y[np.arange(x.shape[0]) != row]).all()
    assert_within_bound(y, rms_norm_bound(x, weight, eps=eps))


@given(problem=problems(), data=st.data())
def test_slices_of_rows(backend, problem, data):
    x, weight, eps = problem
    eps = eps or 1e-5
    x = np.stack([x, -x, x / 2])
    start = data.draw(st.integers(0, x.shape[1] - 1))
    stop = data.draw(st.integers(start + 1, x.shape[1]))
    limit = 2 * rms_norm_bound(x, weight, eps=eps).limit[1:2, start:stop]
    whole, some = (run(backend, rows, weight, eps) for rows in (x, x[1:2, start:stop]))
    oracle.assert_apart_at_most(some, whole[1:2, start:stop], limit)


@given(problem=problems(), data=st.data())
def test_channels_may_be_permuted(backend, problem, data):
    x, weight, eps = problem
    eps = eps or 1e-5
    order = np.array(data.draw(st.permutations(range(x.shape[1]))))
    limit = 2 * rms_norm_bound(x, weight, eps=eps).limit[:, order]
    y = run(backend, x, weight, eps)[:, order]
    oracle.assert_apart_at_most(run(backend, x[:, order], weight[order], eps), y, limit)


@given(problem=problems())
def test_rerun_gives_the_same_bits(backend, problem):
    first, *others = (run(backend, *problem) for _ in range(3))
    for other in others:
        assert_same_bits(first, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
def test_read_only_arguments_stay_as_they_are(dtype, data):
    x, weight, _ = data.draw(problems(dtype, dtype))
    copies = x.copy(), weight.copy()
    x.flags.writeable = weight.flags.writeable = False
    rms_norm(x, weight, eps=1e-5)
    assert_same_bits(x, copies[0])
    assert_same_bits(weight, copies[1])


@given(problem=problems())
def test_memory_order_is_free(problem):
    x, weight, eps = problem
    eps = eps or 1e-5
    wide = np.zeros((2 * x.shape[0], 3 * x.shape[1]), np.float32)
    wide[::2, ::3] = x
    for strided in (np.asfortranarray(x), wide[::2, ::3]):
        assert_like_naive(rms_norm(strided, weight[::-1].copy()[::-1], eps=eps), x, weight, eps)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3,)])
def test_any_leading_shape(backend, shape):
    assert run(backend, np.ones(shape, np.float32), np.ones(3, np.float32), 1e-5).shape == shape


@pytest.mark.parametrize("kind", [np.float64, np.float32, float, int])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_scalar_widens_the_result(kind, dtype):
    x = np.ones((1, 3), np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else dtype)
    y = rms_norm(x, x[0], eps=kind(1))
    assert y.dtype == x.dtype
    assert_same_bits(y, rms_norm(x, x[0], eps=1.0))


X = np.zeros((2, 3), np.float32)
W = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("x", "weight", "eps", "error", "message"),
    [
        (np.float32(1), W, 1e-5, ValueError, r"x: expected shape \[..., H\], got a scalar"),
        (X, W[:2], 1e-5, ValueError, r"weight: expected shape \[3\], .*, got \[2\]"),
        (X, X, 1e-5, ValueError, r"weight: expected shape \[3\], .*, got \[2, 3\]"),
        (X, W, -1e-5, ValueError, r"eps: expected a finite number, zero or more, got -1e-05"),
        (X, W, "1e-5", TypeError, "eps: expected a number, got str"),
        (X, W, True, TypeError, "eps: expected a number, got bool"),
        (X, W, np.nan, ValueError, "eps: expected a finite number, .*, got nan"),
        (X, W, np.inf, ValueError, "eps: expected a finite number, .*, got inf"),
        (X.astype(int), W, 1e-5, TypeError, "x: expected one of the dtypes .*, got int64"),
        (X, W.astype(int), 1e-5, TypeError, "weight: expected one of the dtypes .*, got int64"),
        (X.tolist(), W, 1e-5, TypeError, "x: expected an array of NumPy, .*, got list"),
        (
            X,
            array_api_strict.zeros(3, dtype=array_api_strict.float32),
            1e-5,
            TypeError,
            "weight: expected an array of the same library as x, numpy",
        ),
    ],
)
def test_refuses(x, weight, eps, error, message):
    with pytest.raises(error, match=message):
        rms_norm(x, weight, eps=eps)


def test_eps_has_no_default():
    with pytest.raises(TypeError, match="eps"):
        rms_norm(X, W)


def test_refuses_devices_that_differ():
    x, weight = (
        array_api_strict.asarray(a, device=array_api_strict.Device(name))
        for a, name in ((X, "device1"), (W, "no_float64"))
    )
    with pytest.raises(ValueError, match=r"weight: expected to be on the device of x, .*device1"):
        rms_norm(x, weight, eps=1e-5)
