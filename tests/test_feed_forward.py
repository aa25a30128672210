"""`swiglu` and `mlp`: pins, the error at every exponent, and closed forms of whole blocks."""

from __future__ import annotations

import math

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from llama_layers import MLPWeights, mlp, swiglu
from llama_layers.arrays.transfer import to_numpy
from llama_layers.backends.numpy import pointwise
from llama_layers.testing import arrays, assert_same_bits
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("bodies")

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
SMALLEST = {"float32": 2.0**-149, "float64": 2.0**-1074}


def silu(gate):
    """The exact function, in float64 without overflow: g / (1 + e^-g)."""
    return (
        gate / (1 + math.exp(-gate)) if gate >= 0 else gate * math.exp(gate) / (1 + math.exp(gate))
    )


def test_pins(backend):
    gate = np.array([0.0, -0.0, 1000.0, -1000.0, 3e38, -3e38, 0.5], np.float32)
    up = np.array([5.0, 5.0, 2.0, 2.0, 0.5, 0.5, 0.0], np.float32)
    y = to_numpy(swiglu(backend.array(gate), backend.array(up)))
    expected = np.array([0.0, -0.0, 2000.0, -0.0, 1.5e38, -0.0, 0.0], np.float32)
    assert_same_bits(y, expected)


def test_nan_and_infinity():
    gate = np.array([np.nan, np.inf, 1.0, 0.0])
    y = swiglu(gate, np.array([1.0, 2.0, np.nan, 7.0]))
    np.testing.assert_array_equal(y, [np.nan, np.inf, np.nan, 0.0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
def test_error_at_every_exponent(dtype, data):
    """|error| <= 16 u |y| + |g u| times the smallest subnormal.

    The exponential is within 4 units in the last place, 8 u; a sum, a division and two products
    round once each, to u of their size, and the sigmoid may round to the subnormal grid, which
    gate and up then magnify.
    """
    gate = data.draw(arrays((8,), dtype=dtype, max_magnitude=700.0))
    up = data.draw(arrays((8,), dtype=dtype, max_magnitude=1024.0))
    computed = swiglu(gate, up)
    assert computed.dtype == dtype
    for y, g, u in zip(computed.tolist(), gate.tolist(), up.tolist(), strict=True):
        exact = silu(g) * u
        limit = 16 * UNIT[dtype] * abs(exact) + (1 + abs(g * u) + abs(u)) * SMALLEST[dtype]
        assert abs(y - exact) <= limit, (g, u, y, exact)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_formats_are_computed_in_float32_and_rounded_once(dtype, rng):
    gate, up = (4 * rng.standard_normal((2, 50))).astype(dtype)
    expected = swiglu(gate.astype(np.float32), up.astype(np.float32)).astype(dtype)
    assert_same_bits(swiglu(gate, up), expected)


def test_on_every_library(backend, rng):
    gate, up = (10 * rng.standard_normal((2, 3, 50))).astype(np.float32)
    y = swiglu(backend.array(gate), backend.array(up))
    assert backend.holds(y)
    exact = np.vectorize(silu)(gate.astype(np.float64)) * up
    np.testing.assert_allclose(to_numpy(y), exact, rtol=16 * 2.0**-24)


def in_memory(draw, array):
    """The same numbers in another order of axes, backwards, or between others."""
    axes = draw(st.permutations(range(array.ndim)))
    steps = [draw(st.sampled_from([1, 2, -1])) for _ in axes]
    wide = np.full([2 * array.shape[axis] for axis in axes], np.nan, array.dtype)
    starts = [None if step < 0 else 0 for step in steps]
    some = wide[tuple(slice(a, None, step) for a, step in zip(starts, steps, strict=True))]
    some = some[tuple(slice(array.shape[axis]) for axis in axes)].transpose(np.argsort(axes))
    some[...] = array
    some.flags.writeable = False
    return some


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@given(data=st.data())
def test_any_shape_and_memory_order_in_blocks(dtype, data):
    """What each element becomes depends on no other one, nor on where it lies."""
    shape = data.draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    gate, up = (4 * rng.standard_normal((2, *shape))).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointwise, "BLOCK", data.draw(st.sampled_from([1, 5, 1000])))
        if shape and data.draw(st.booleans()):
            y = swiglu(in_memory(data.draw, gate), in_memory(data.draw, up))
        else:
            y = swiglu(np.asarray(gate), np.asarray(up))
    assert (y.shape, y.dtype) == (shape, np.dtype(dtype))
    exact = np.array(
        [
            silu(g) * u
            for g, u in zip(gate.ravel().astype(float), up.ravel().astype(float), strict=True)
        ]
    )
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8} | UNIT
    subnormal = 2.0**-24 if dtype == "float16" else 0
    np.testing.assert_allclose(
        np.asarray(y, np.float64).ravel(), exact, rtol=16 * unit[dtype], atol=subnormal
    )


G = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (G, G.T, ValueError, r"up: expected shape \[2, 3\] of gate, got \[3, 2\]"),
        (G, G[:1], ValueError, r"up: expected shape \[2, 3\] of gate, got \[1, 3\]"),
        (
            G,
            G.astype(np.float32),
            TypeError,
            "up: expected the dtype of gate, float64, got float32",
        ),
        (G.astype(int), G, TypeError, "gate: expected one of the dtypes"),
        (G, 1.0, TypeError, "up: expected an array"),
        (G, array_api_strict.asarray(G), TypeError, "up: expected an array of the same library"),
    ],
)
def test_refuses(gate, up, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate, up)


def random_mlp(rng, hidden=5, inner=7, biases=True):
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    matrices = [rng.standard_normal(shape) for shape in shapes]
    vectors = [rng.standard_normal(shape[0]) for shape in shapes]
    return MLPWeights(*matrices, *(vectors if biases else ()))


@pytest.mark.parametrize("biases", [False, True])
def test_like_loops(biases, rng):
    w = random_mlp(rng, biases=biases)
    x = rng.standard_normal((2, 3, 5))
    gate = oracle.linear(x, w.gate_proj, w.gate_bias)
    up = oracle.linear(x, w.up_proj, w.up_bias)
    expected = oracle.linear(np.vectorize(silu)(gate) * up, w.down_proj, w.down_bias)
    np.testing.assert_allclose(mlp(x, w), expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("zero", ["gate_proj", "up_proj", "down_proj"])
def test_zero_matrix_gives_zeros(zero, rng):
    w = random_mlp(rng, biases=False)
    parts = {name: getattr(w, name) for name in ("gate_proj", "up_proj", "down_proj")}
    y = mlp(rng.standard_normal((2, 5)), MLPWeights(**parts | {zero: 0 * parts[zero]}))
    np.testing.assert_array_equal(y, np.zeros((2, 5)))


def test_zero_matrices_give_the_bias(rng):
    w = random_mlp(rng)
    zero = MLPWeights(0 * w.gate_proj, 0 * w.up_proj, 0 * w.down_proj, down_bias=w.down_bias)
    assert_same_bits(mlp(rng.standard_normal((1, 5)), zero)[0], w.down_bias + 0.0)


def test_linear_in_up(rng):
    """Twice the up projection is twice the result, bit for bit; twice the gate is not."""
    w = random_mlp(rng, biases=False)
    x = rng.standard_normal((2, 5))
    assert_same_bits(mlp(x, MLPWeights(w.gate_proj, 2 * w.up_proj, w.down_proj)), 2 * mlp(x, w))
    other = mlp(x, MLPWeights(2 * w.gate_proj, w.up_proj, w.down_proj))
    assert np.abs(other - 2 * mlp(x, w)).max() > 0.01


def test_mlp_refuses_what_linear_does(rng):
    w = random_mlp(rng)
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, 4\] for x \[1, 4\]"):
        mlp(np.zeros((1, 4)), w)
    with pytest.raises(TypeError, match="weight: expected a dtype that float32 sums hold"):
        mlp(np.zeros((1, 5), np.float32), w)
