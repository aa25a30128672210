"""to_namespace and the messages for what is not an array, with what every test run has."""

from __future__ import annotations

import types

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from llama_layers import rms_norm, to_namespace
from llama_layers.arrays.transfer import from_numpy


def test_numpy_to_itself():
    for array in (np.ones(2, ml_dtypes.bfloat16), np.ones(3, ">f4")[::-1], np.float32(2)):
        assert to_namespace(array, np) is array
        assert to_namespace(array, np, device="cpu") is array


@pytest.mark.parametrize("dtype", "bool int8 uint16 int64 float32 float64 complex64".split())
@pytest.mark.parametrize("order", ["<", ">"])
def test_there_and_back(dtype, order):
    raw = bytes(range(8)) * (4 * np.dtype(dtype).itemsize)
    if dtype == "bool":
        raw = bytes(i % 2 for i in raw)
    array = np.frombuffer(raw, np.dtype(dtype).newbyteorder(order)).reshape(4, -1)[::-1, ::2]
    there = to_namespace(array, array_api_strict)
    assert there.__array_namespace__() is array_api_strict
    back = to_namespace(there, np)
    assert back.dtype == array.dtype.newbyteorder("=")
    assert back.astype(array.dtype).tobytes() == array.tobytes()


def test_a_copy_of_its_own():
    array = np.ones(2)
    moved = from_numpy(array, array_api_strict)
    array[0] = 5
    assert moved[0] == 1


@pytest.mark.parametrize(
    ("array", "xp", "device", "error", "message"),
    [
        ([1.0], np, None, TypeError, "array: expected an array of NumPy, CuPy or .*, got list"),
        (None, np, None, TypeError, "array: expected an array, got None"),
        (np.ones(2), "numpy", None, TypeError, "xp: expected the module of a library, .* got str"),
        (np.ones(2), types, None, TypeError, "xp: expected the module .* got types"),
        (
            np.ones(2),
            np,
            "cuda",
            ValueError,
            "device: expected None or 'cpu' for NumPy, got 'cuda'",
        ),
        (
            np.ones(2, ml_dtypes.bfloat16),
            array_api_strict,
            None,
            TypeError,
            "array: array_api_strict has no dtype bfloat16",
        ),
    ],
)
def test_refusals(array, xp, device, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        to_namespace(array, xp, device=device)


def test_a_tensor_of_a_library_without_the_standard():
    """Many libraries call their arrays Tensor: the message tells which it is."""
    tensor = type("Tensor", (), {"__module__": "tinygrad.tensor"})()
    message = "x: expected an array of NumPy, CuPy or another .* library, got tinygrad.Tensor"
    with pytest.raises(TypeError, match=message):
        rms_norm(tensor, np.ones(2), eps=1e-5)
