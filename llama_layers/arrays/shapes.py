"""Checks that arrays fit each other."""

from __future__ import annotations

from llama_layers.arrays.dtypes import dtype_name, float_format
from llama_layers.arrays.types import Array


def check_shape(name: str, array: Array, *expected: int | str) -> None:
    """Raise unless an array has floats and a shape, in which a name stands for any number."""
    float_format(name, array)
    if array.ndim != len(expected) or any(
        not isinstance(size, str) and size != found
        for size, found in zip(expected, array.shape, strict=True)
    ):
        shape = ", ".join(map(str, expected))
        raise ValueError(f"{name}: expected shape [{shape}], got {list(array.shape)}")


def check_same_dtype(**arrays: Array) -> None:
    """Raise TypeError unless all arrays have the format of the first, in any byte order."""
    (first, array), *others = arrays.items()
    for name, other in others:
        if dtype_name(other.dtype) != dtype_name(array.dtype):
            raise TypeError(
                f"{name}: expected the dtype of {first}, {dtype_name(array.dtype)}, "
                f"got {dtype_name(other.dtype)}"
            )
