"""RoPE and the gate with CuPy's bodies: the properties of every backend, and those of kernels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from llama_layers import apply_rope, rope_table, swiglu
from llama_layers.testing import arrays, assert_same_bits, assert_within_bound
from llama_layers.verify import rope_bound, swiglu_bound
from tests.test_feed_forward import in_memory, test_on_every_library, test_pins  # noqa: F401
from tests.test_rope import config_of, test_basis_vectors  # noqa: F401

DTYPES = ["bfloat16", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_gate_is_within_the_bound(backend, dtype, data):
    most = {"float16": 200.0}.get(dtype, 700.0)
    gate, up = (data.draw(arrays((9,), dtype=dtype, max_magnitude=most)) for _ in range(2))
    y = swiglu(backend.array(gate), backend.array(up))
    assert y.dtype == gate.dtype
    assert_within_bound(y.get(), swiglu_bound(gate, up))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_of_every_size(backend, dtype, rng):
    """Infinities and NaN too; of three blocks of threads, of which the last is not full, and has
    numbers behind its own that are no NaN."""
    gate, up = (4 * rng.standard_normal((2, 800))).astype(dtype)
    gate[:4] = np.nan, np.inf, -np.inf, 1
    up[1:4] = 2, 2, np.nan
    y = swiglu(backend.array(gate)[:517], backend.array(up)[:517]).get()
    np.testing.assert_array_equal(y[[0, 1, 3]].astype(float), [np.nan, np.inf, np.nan])
    assert_within_bound(y[4:], swiglu_bound(gate[4:517], up[4:517]))


@pytest.mark.parametrize("backend", ["stand-in"], indirect=True)  # which makes any strides
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_gate_of_any_shape_and_memory_order(backend, dtype, data):
    shape = data.draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    gate, up = (4 * rng.standard_normal((2, *shape))).astype(dtype)
    on_device = [backend.array(np.asarray(array)) for array in (gate, up)]
    if shape and data.draw(st.booleans()):
        on_device = [laid_out(backend, in_memory(data.draw, array)) for array in (gate, up)]
    y = swiglu(*on_device)
    assert (y.shape, y.dtype) == (shape, np.dtype(dtype))
    assert_within_bound(y.get(), swiglu_bound(gate, up))


def laid_out(backend, numbers):
    """On the device as in main memory."""
    whole = numbers.base if numbers.base is not None else numbers
    while whole.base is not None:
        whole = whole.base
    on_device = backend.array(np.ascontiguousarray(whole))
    first = numbers.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    flat = on_device.reshape(-1)
    view = flat[:0]
    view._numbers = np.lib.stride_tricks.as_strided(
        flat._numbers[first // numbers.itemsize :], numbers.shape, numbers.strides
    )
    return view


def turned(backend, x, positions, layout):
    table = rope_table(positions, config_of(x.shape[3]), like=x)
    y = apply_rope(backend.array(x), *map(backend.array, table), layout=layout)
    assert y.dtype == x.dtype
    return y.get()


LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_turns_are_within_the_bound(backend, dtype, layout, data):
    batch, queries, heads = (data.draw(st.integers(1, 3)) for _ in range(3))
    width = data.draw(st.sampled_from([2, 6, 8, 64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((batch, queries, heads, width)).astype(dtype)
    shape = data.draw(st.sampled_from([(queries,), (1, queries), (batch, queries)]))
    positions = rng.integers(1000, size=shape)
    bound = rope_bound(x, positions.reshape(shape[-2:]), config_of(width), layout=layout)
    assert_within_bound(turned(backend, x, positions, layout), bound)


@LAYOUTS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_formats_are_turned_in_float32_and_rounded_once(backend, dtype, layout, rng):
    wide = rng.standard_normal((2, 5, 3, 8)).astype(dtype).astype(np.float32)
    expected = turned(backend, wide, np.arange(5), layout).astype(dtype)
    assert_same_bits(turned(backend, wide.astype(dtype), np.arange(5), layout), expected)


def test_ties_of_bfloat16_go_to_even(backend):
    """1 + 2**-8 is half way from 1 to 1 + 2**-7, and 1 + 3 * 2**-8 from there to 1 + 2**-6."""
    x = np.array([[1, -1], [1 + 2.0**-7, -1]], ml_dtypes.bfloat16).reshape(1, 1, 2, 2)
    cos, sin = np.ones((1, 1), np.float32), np.full((1, 1), 2.0**-8, np.float32)
    y = apply_rope(*map(backend.array, (x, cos, sin))).get()
    np.testing.assert_array_equal(y[0, 0, :, 0].astype(float), [1, 1 + 2.0**-6])


def test_nan_of_any_bits_stays_nan(backend):
    """0x7fffffff is the NaN that NVIDIA's GPUs make: half a unit more makes it minus zero."""
    cos = np.array([[0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001]], np.uint32).view(np.float32)
    x = np.ones((1, 1, 1, 6), ml_dtypes.bfloat16)
    y = apply_rope(*map(backend.array, (x, cos, np.zeros_like(cos)))).get()
    assert np.isnan(y.astype(np.float32)).all()


@LAYOUTS
def test_queries_of_a_fused_product(backend, layout, rng):
    """Views: each token's queries lie before its keys and values."""
    fused = rng.standard_normal((2, 5, 7 * 8)).astype(np.float32)
    table = rope_table(np.arange(5), config_of(8), like=fused)
    for first, last in ((0, 4), (4, 6)):
        part = fused[:, :, 8 * first : 8 * last]
        view = backend.array(fused)[:, :, 8 * first : 8 * last].reshape((2, 5, last - first, 8))
        y = apply_rope(view, *map(backend.array, table), layout=layout).get()
        expected = turned(backend, part.reshape(2, 5, last - first, 8), np.arange(5), layout)
        assert_same_bits(y, expected)


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)])
def test_nothing_to_turn(backend, shape):
    x = backend.array(np.zeros(shape, np.float32))
    table = backend.array(np.zeros((shape[1], shape[3] // 2), np.float32))
    assert apply_rope(x, table, table).shape == shape


@LAYOUTS
@pytest.mark.parametrize("shapes", [((2, 5, 4), (5, 4)), ((5, 4), (2, 5, 4)), ((1, 5, 4), (5, 4))])
def test_tables_of_as_many_rows_as_there_are_sequences_or_one(backend, shapes, layout, rng):
    """A kernel that counts the rows of one table must not look for as many in the other."""
    x = rng.standard_normal((2, 5, 3, 8), dtype=np.float32)
    cos, sin = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    found = apply_rope(*map(backend.array, (x, cos, sin)), layout=layout).get()
    np.testing.assert_allclose(found, apply_rope(x, cos, sin, layout=layout), 1e-5, 1e-6)
