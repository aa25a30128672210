"""Checks of arguments: numbers (Python's or NumPy's, but no bools), words and arrays."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np

from llama_layers.arrays.dtypes import dtype_name, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, Number
from llama_layers.errors import shown

# Slots and positions of a cache are counted in int32, which every library has.
MOST_TOKENS = 2**31 - 1


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object, most: int | None = None) -> int:
    """Return a positive integer as Python's, since NumPy's small ones overflow; else ValueError."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected at most {most}, got {shown(value)}")
    return int(value)


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless a value is a real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_finite(name: str, value: Number, *, negative: bool = True) -> float:
    """Return a finite number as Python's float, since NumPy's would widen arrays; else raise."""
    check_number(name, value)
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not math.isfinite(number) or (number < 0 and not negative):
        expected = "a finite number" if negative else "a finite number, zero or more"
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return a bool, Python's or NumPy's, as Python's; else TypeError."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return bool(value)


def check_choice(name: str, value: object, *choices: str) -> None:
    """Raise ValueError unless a value is one of some words."""
    if not isinstance(value, str) or value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


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


def check_like(name: str, result: Any, array: Array) -> None:
    """Raise unless the result of a caller's function has the shape, dtype and library of an array.

    `name` says which function.
    """
    is_array = hasattr(result, "shape") and hasattr(result, "dtype")
    if is_array:
        namespace(**{"its argument": array, name: result})
        if tuple(result.shape) == tuple(array.shape) and result.dtype == array.dtype:
            return
    got = f"{list(result.shape)}, {result.dtype}" if is_array else type(result).__name__
    expected = f"{list(array.shape)}, {array.dtype}"
    raise ValueError(f"{name}: expected an array of shape and dtype {expected}, got {got}")
