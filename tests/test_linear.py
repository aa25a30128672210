"""`linear`: values, dtypes, what it leaves alone, what it refuses."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import linear
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import arrays, assert_same_bits, assert_within_bound
from llama_layers.verify import Bound, linear_bound
from tests.support import oracle

# Formats of x and of the weights that NumPy can be given; the sums must hold the weights.
FORMATS = [
    ("float32", "bfloat16"),
    ("float32", "float16"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float16"),
    ("float16", "bfloat16"),
    ("float64", "float32"),
    ("float64", "float64"),
]


@st.composite
def problems(draw, dtype="float32", weight_dtype="float32", max_magnitude=1024.0):
    """Some x [rows, K], a weight [N, K], and a bias [N] or None."""
    rows, inputs, outputs = (draw(st.integers(1, most)) for most in (4, 24, 8))
    options = {"max_magnitude": max_magnitude}
    x = draw(arrays((rows, inputs), dtype=dtype, **options))
    weight = draw(arrays((outputs, inputs), dtype=weight_dtype, **options))
    bias = draw(st.none() | arrays((outputs,), dtype=weight_dtype, **options))
    return x, weight, bias


def run(backend, x, weight, bias=None):
    """The result on a backend, as a NumPy array."""
    with np.errstate(all="ignore"):
        arguments = [None if a is None else backend.array(a) for a in (x, weight, bias)]
        y = linear(*arguments)
    assert y.dtype == arguments[0].dtype
    assert backend.holds(y)
    return to_numpy(y)


def assert_like_naive(y, x, weight, bias):
    bound = linear_bound(x, weight, bias)
    exact = oracle.linear(x, weight, bias)
    magnitude = oracle.linear(abs(x), abs(weight), None if bias is None else abs(bias))
    terms = x.shape[-1] + 1
    # Both round products and sums, which BLAS may fuse, down to float64's smallest number.
    rounding = 2.0**-53 * magnitude + 2.0**-1074
    oracle.assert_apart_at_most(bound.exact, exact, 2 * terms * rounding)
    assert np.isfinite(y[np.isfinite(bound.limit)]).all()
    assert_within_bound(y, Bound(exact, bound.limit, bound.usual))


@given(problem=problems())
def test_within_bound_of_naive_loops(backend, problem):
    assert_like_naive(run(backend, *problem), *problem)


@given(problem=problems(max_magnitude=np.inf))
def test_within_bound_at_every_magnitude(backend, problem):
    assert_like_naive(run(backend, *problem), *problem)


@pytest.mark.parametrize(("dtype", "weight_dtype"), FORMATS)
@given(data=st.data())
def test_within_bound_in_every_format(dtype, weight_dtype, data):
    x, weight, bias = data.draw(problems(dtype, weight_dtype, max_magnitude=2.0**100))
    with np.errstate(all="ignore"):
        y = linear(x, weight, bias)
    assert y.dtype == x.dtype
    assert_like_naive(y, x, weight, bias)


def test_float16_sums_may_exceed_float16():
    """Terms of 60000 that cancel: only sums in a wider format see them out."""
    x = np.array([[60000, 60000, -60000, -59000]], np.float16)
    np.testing.assert_array_equal(linear(x, np.ones((1, 4), np.float16)), [[992]])


def test_bfloat16_sums_are_kept_in_float32():
    """Counting to 4096 by ones ends at 256 in bfloat16."""
    ones = np.ones((1, 4096), ml_dtypes.bfloat16)
    assert linear(ones, ones)[0, 0] == 4096


def test_sixteen_bit_weight_of_several_blocks(rng):
    """The NumPy body widens a 16-bit weight block by block; this one has three blocks."""
    weight = rng.standard_normal((2500, 1024)).astype(np.float16)
    x = rng.standard_normal((2, 1024)).astype(np.float32)
    assert_within_bound(linear(x, weight), linear_bound(x, weight))


@given(problem=problems(), data=st.data())
def test_additive_in_x(backend, problem, data):
    """x = high + low, exactly, by clearing the last bits of each number of x."""
    x, weight, _ = problem
    bits = data.draw(st.integers(1, 23))
    high = (x.view(np.uint32) >> bits << bits).view(np.float32)
    low = x - high
    limit = sum(linear_bound(part, weight).limit for part in (x, high, low))
    whole = run(backend, x, weight).astype(np.float64)
    parts = (run(backend, part, weight).astype(np.float64) for part in (high, low))
    oracle.assert_apart_at_most(whole, sum(parts), limit)


@given(problem=problems(), data=st.data())
def test_additive_over_channels(backend, problem, data):
    x, weight, bias = problem
    cut = data.draw(st.integers(0, x.shape[1]))
    bounds = linear_bound(x[:, :cut], weight[:, :cut]), linear_bound(x[:, cut:], weight[:, cut:])
    limit = sum(bound.limit for bound in (*bounds, linear_bound(x, weight, bias)))
    left = run(backend, x[:, :cut], weight[:, :cut]).astype(np.float64)
    right = run(backend, x[:, cut:], weight[:, cut:])
    sums = left + right if bias is None else left + right + bias
    oracle.assert_apart_at_most(run(backend, x, weight, bias), sums, limit)


@given(problem=problems(), exponent=st.integers(-8, 8))
def test_homogeneous(backend, problem, exponent):
    x, weight, _ = problem
    x = np.where(abs(x) < 2.0**-100, np.float32(0), x)  # so that scaling is exact
    factor = np.float32(2.0**exponent)
    limit = linear_bound(x, weight).limit * factor + linear_bound(x * factor, weight).limit
    scaled = run(backend, x * factor, weight)
    oracle.assert_apart_at_most(scaled, run(backend, x, weight).astype(float) * factor, limit)


@given(problem=problems(), data=st.data(), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_nonfinite_row_stays_in_its_row(backend, problem, data, value):
    x, weight, bias = problem
    row = data.draw(st.integers(0, x.shape[0] - 1))
    x[row, data.draw(st.integers(0, x.shape[1] - 1))] = value
    y = run(backend, x, weight, bias)
    assert not np.isfinite(y[row]).any()
    others = np.arange(x.shape[0]) != row
    assert np.isfinite(y[others]).all()
    assert_within_bound(y, linear_bound(x, weight, bias))


@given(problem=problems())
def test_rerun_gives_the_same_bits(backend, problem):
    first, *others = (run(backend, *problem) for _ in range(3))
    for other in others:
        assert_same_bits(first, other)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(data=st.data())
def test_read_only_arguments_stay_as_they_are(dtype, data):
    arguments = data.draw(problems(dtype, dtype))
    kept = [None if a is None else a.copy() for a in arguments]
    for array in arguments:
        if array is not None:
            array.flags.writeable = False
    with np.errstate(over="ignore"):
        linear(*arguments)
    for array, copy in zip(arguments, kept, strict=True):
        if array is not None:
            assert_same_bits(array, copy)


@given(problem=problems())
def test_memory_order_is_free(problem):
    x, weight, bias = problem
    wide = np.zeros((2 * x.shape[0], 3 * x.shape[1]), np.float32)
    for strided in (np.asfortranarray(x), wide[::2, ::3], wide[::-2, ::-3]):
        if strided.base is wide:
            strided[...] = x
        for layout in (weight, np.asfortranarray(weight), weight[::-1][::-1]):
            assert_within_bound(linear(strided, layout, bias), linear_bound(x, weight, bias))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 0, 3)])
def test_no_rows(backend, shape):
    x, weight = np.zeros(shape, np.float32), np.ones((5, 3), np.float32)
    assert run(backend, x, weight).shape == (*shape[:-1], 5)


def test_no_channels(backend):
    x, weight = np.zeros((2, 0), np.float32), np.zeros((3, 0), np.float32)
    bias = np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(run(backend, x, weight, bias), [[1, 2, 3], [1, 2, 3]])


def test_one_row(backend):
    x, weight = np.array([1, 2], np.float32), np.array([[3, 4], [5, 6]], np.float32)
    np.testing.assert_array_equal(run(backend, x, weight), [11, 17])


X = np.zeros((2, 3), np.float32)
W = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.float32(1), W), ValueError, r"x: expected shape \[..., K\], got a scalar"),
        ((X, W[0]), ValueError, r"weight: expected shape \[N, 3\] for x \[2, 3\], got \[3\]"),
        ((X, W.T), ValueError, r"weight: expected shape \[N, 3\] for x \[2, 3\], got \[3, 4\]"),
        ((X, W, W), ValueError, r"bias: expected shape \[4\], got \[4, 3\]"),
        ((X, W, W[0]), ValueError, r"bias: expected shape \[4\], got \[3\]"),
        ((X.astype(int), W), TypeError, "x: expected one of the dtypes .*float32.*, got int64"),
        ((X, W.astype(bool)), TypeError, "weight: expected one of the dtypes .*, got bool"),
        ((X, W, np.zeros(4, int)), TypeError, "bias: expected one of the dtypes .*, got int64"),
        ((X, W.astype(float)), TypeError, "weight: .* float32 sums hold exactly .*, got float64"),
        ((X, W, np.zeros(4)), TypeError, "bias: .* float32 sums hold exactly .*, got float64"),
        (([[1.0]], W), TypeError, "x: expected an array of NumPy, .*, got list"),
        ((X, None), TypeError, "weight: expected an array, got NoneType"),
        ((X, 2.0), TypeError, "weight: expected an array of NumPy, .*, got float"),
        (
            (X, array_api_strict.zeros((4, 3), dtype=array_api_strict.float32)),
            TypeError,
            "weight: expected an array of the same library as x, numpy, got .* array_api_strict",
        ),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        linear(*arguments)


def test_refuses_devices_that_differ():
    on = {
        name: array_api_strict.asarray(X, device=array_api_strict.Device(name))
        for name in ("device1", "device2")
    }
    with pytest.raises(ValueError, match=r"weight: expected to be on the device of x, .*device1"):
        linear(on["device1"], on["device2"])
