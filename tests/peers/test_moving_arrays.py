"""to_namespace between NumPy, torch and jax: every dtype, bit for bit."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_layers import to_namespace
from llama_layers.arrays.dtypes import dtype_name

pytestmark = pytest.mark.peer

LIBRARIES = {"numpy": np, "torch": torch, "jax": jnp}
NATIVE = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64"
BY_ML_DTYPES = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
DTYPES = [*NATIVE.split(), "complex128", *BY_ML_DTYPES.split()]
PAIRS = list(permutations(LIBRARIES, 2))


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def of_bytes(raw: bytes, dtype: str, shape: tuple[int, ...]) -> Any:
    if dtype == "bool":
        return (np.frombuffer(raw, np.uint8) % 2 == 1).reshape(shape)
    return np.frombuffer(raw, getattr(ml_dtypes, dtype, None) or dtype).reshape(shape)


def bits(array: Any) -> bytes:
    """Read by each library's own means, as integers."""
    if isinstance(array, torch.Tensor):
        in_order = array.flatten().clone(memory_format=torch.contiguous_format)
        return bytes(in_order.view(torch.uint8).numpy())
    return np.asarray(array).tobytes()


LAYOUTS = {
    "as it is": lambda a: a.copy(),
    "read-only": lambda a: a,
    "backwards": lambda a: a.copy()[::-1, ::-1],
    "strided": lambda a: a.repeat(2, axis=1)[:, ::2],
    "in Fortran's order": np.asfortranarray,
    "not aligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "one row for all": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), shape=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_numpy_there_and_back(dtype, layout, data, shape):
    """Any bits: NaN with payloads, signalling ones, negative zeros and subnormal numbers."""
    count = shape[0] * shape[1]
    size = np.dtype(getattr(ml_dtypes, dtype, None) or dtype).itemsize
    raw = data.draw(st.binary(min_size=count * size, max_size=count * size))
    plain = of_bytes(raw, dtype, shape)
    array = LAYOUTS[layout](plain)
    expected = plain[:1].repeat(shape[0], axis=0) if layout == "one row for all" else plain
    expected = (expected[::-1, ::-1] if layout == "backwards" else expected).tobytes()
    for name in ("torch", "jax"):
        there = to_namespace(array, LIBRARIES[name])
        assert isinstance(there, torch.Tensor if name == "torch" else jax.Array)
        assert (dtype_name(there.dtype), tuple(there.shape)) == (dtype, shape)
        assert bits(there) == expected
        if name == "torch" and count:
            there.flatten()  # memory that torch can read
        back = to_namespace(there, np)
        assert (back.dtype, back.shape) == (plain.dtype, shape)
        assert back.tobytes() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_all_bytes(pair, dtype):
    first, second = (LIBRARIES[name] for name in pair)
    size = np.dtype(getattr(ml_dtypes, dtype, None) or dtype).itemsize
    raw = bytes(range(256)) * size
    array = to_namespace(of_bytes(raw, dtype, (16, 16)), first)
    moved = to_namespace(array, second)
    assert dtype_name(moved.dtype) == dtype
    assert bits(moved) == bits(array) == of_bytes(raw, dtype, (16, 16)).tobytes()
    assert to_namespace(moved, second) is moved
    scalar = to_namespace(array[3, 4], second)
    assert scalar.shape == ()
    assert bits(scalar) == bits(array[3, 4])
    part = to_namespace(array[1::3, ::2].T, second)
    assert bits(part) == of_bytes(raw, dtype, (16, 16))[1::3, ::2].T.tobytes()


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
def test_memory_is_shared_where_both_allow_it(pair):
    first, second = (LIBRARIES[name] for name in pair)
    # jax shares memory that starts at a multiple of 64 bytes, and copies other.
    room = np.zeros(256, np.uint8)
    start = -room.ctypes.data % 64
    array = to_namespace(room[start : start + 128].view(np.float32), first)
    assert address(to_namespace(array, second)) == address(array)


def address(array: Any) -> int:
    if isinstance(array, torch.Tensor):
        return array.data_ptr()
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


def test_read_only_memory_is_copied_for_torch():
    """Which would write to it, as to a mapped file."""
    array = np.ones(4, np.float32)
    array.flags.writeable = False
    to_namespace(array, torch)[0] = 5
    assert array[0] == 1


def test_lazy_signs_and_gradients():
    array = torch.tensor([1 + 2j, 3 - 4j])
    np.testing.assert_array_equal(to_namespace(array.conj(), np), [1 - 2j, 3 + 4j])
    np.testing.assert_array_equal(to_namespace(array.conj().imag, jnp), [-2, 4])
    np.testing.assert_array_equal(to_namespace(array[:1].conj().imag, jnp), [-2])
    np.testing.assert_array_equal(to_namespace(torch._neg_view(torch.ones(3)), jnp), [-1] * 3)
    parameter = torch.nn.Parameter(torch.ones(2))
    assert to_namespace(parameter, torch) is parameter
    np.testing.assert_array_equal(to_namespace(parameter, jnp), [1, 1])


def test_devices():
    array = np.ones(2, np.float32)
    cpu = jax.devices("cpu")[0]
    assert to_namespace(array, jnp, device=cpu).device == cpu
    assert to_namespace(array, torch, device="meta").is_meta
    assert to_namespace(to_namespace(array, torch), torch, device="meta").is_meta
    assert to_namespace(jnp.ones(2), np, device="cpu").flags["OWNDATA"] is False


def traced(x: Any) -> Any:
    return to_namespace(x, np)


@pytest.mark.parametrize(
    ("array", "xp", "message"),
    [
        (np.ones(2, ml_dtypes.float8_e3m4), torch, "array: torch has no dtype float8_e3m4"),
        (np.ones(2, np.longdouble), torch, "array: torch has no dtype float128"),
        (np.array(["a"]), jnp, "array: jax has no dtype str32"),
        (
            torch.ones(2).bfloat16(),
            array_api_strict,
            "array: array_api_strict has no dtype bfloat16",
        ),
        (torch.ones(2, device="meta"), np, "array: expected an array with numbers, got one that"),
        (torch.ones(2).to_sparse(), np, "array: expected a dense tensor, got the layout torch.sp"),
        (np.ones(2), jax, "xp: expected the module of a library, such as numpy, .*, got jax"),
    ],
)
def test_refusals(array, xp, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        to_namespace(array, xp)


def test_what_has_no_numbers():
    with pytest.raises(TypeError, match=r"^array: expected an array with numbers, got one that"):
        jax.jit(traced)(jnp.ones(2))


def test_jax_without_64_bits():
    with jax.enable_x64(False):
        for array in (np.ones(2), torch.ones(2, dtype=torch.int64)):
            with pytest.raises(TypeError, match=r"^array: jax turns (\w+)64 into \w+32: cast it"):
                to_namespace(array, jnp)
