"""Arguments for fuzzing: arrays that lie in memory in every way, and what is not an array."""

from __future__ import annotations

import warnings
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np

from tests.support.layouts import LAYOUTS

FLOATS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}
OTHER_DTYPES = (
    "?", "i1", "u1", "i4", "i8", "u8", "c8", "O", "U3", "S2", "g", "M8[s]", [("a", "f4")],
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 7, True, 0.5, -0.0, 1e-300, 1e300, np.nan, np.inf, 2**31, 2**63, 10**30,
    10**400, -(10**400), 1j, np.int8(2), np.uint64(3), np.float32(0.5), np.float16(2), np.bool_(1),
)  # fmt: skip
OBJECTS = (
    None, "", "half", b"x", (), [], {}, [1, 2], (None, None), {1: 2}, object(), ..., int, len,
    np.float32, [[1.0], [2.0, 3.0]], "x\ny" * 500, range(3),
)  # fmt: skip


def one_of(rng: np.random.Generator, choices: Any) -> Any:
    """A choice, as it is."""
    choices = list(choices)
    return choices[rng.integers(len(choices))]


def floats(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Normal numbers, not large."""
    return (rng.standard_normal(shape) / 2).astype(FLOATS[dtype])


def anything(rng: np.random.Generator) -> Any:
    """What is rarely the argument that a function takes."""
    return one_of(rng, NUMBERS if rng.random() < 0.5 else OBJECTS)


def laid_out(rng: np.random.Generator, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The same numbers, elsewhere in memory."""
    how = one_of(rng, LAYOUTS)
    return how, LAYOUTS[how](array)


def repeated(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Zero steps: one number, or row, seen again and again."""
    if not array.size:
        return array
    axis = int(rng.integers(array.ndim)) if array.ndim else 0
    first = array if not array.ndim else array.take([0], axis=axis)
    return np.broadcast_to(first, array.shape)


def reshaped(rng: np.random.Generator, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Of another shape: longer, shorter, empty, or of more or fewer axes."""
    axis = int(rng.integers(array.ndim)) if array.ndim else 0
    changes: dict[str, Any] = {"0-d": lambda: array.reshape(-1)[:1].reshape(())}
    if array.ndim and array.size:
        changes |= {
            "longer": lambda: np.concatenate([array, array.take([0], axis=axis)], axis=axis),
            "shorter": lambda: array.take(range(array.shape[axis] - 1), axis=axis),
            "of one": lambda: array.take([0], axis=axis),
            "empty": lambda: array.take([], axis=axis),
            "with an axis more": lambda: np.expand_dims(array, axis),
            "with an axis less": lambda: array.take(0, axis=axis),
            "transposed": lambda: array.T,
            "flat": lambda: array.reshape(-1),
            "much longer": lambda: np.concatenate([array] * 9, axis=axis),
            "a scalar": lambda: array.reshape(-1)[0],
        }
    elif array.ndim:
        changes = {"with an axis more": lambda: np.expand_dims(array, axis)}
    how = one_of(rng, changes)
    return how, changes[how]()


def retyped(rng: np.random.Generator, array: np.ndarray) -> tuple[str, Any]:
    """Of another dtype, class or library."""
    how = int(rng.integers(10))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if how < 4:
            dtype = one_of(rng, FLOATS)
            return dtype, np.zeros(array.shape, FLOATS[dtype]) + array.astype(FLOATS[dtype])
        if how < 7:
            dtype = one_of(rng, OTHER_DTYPES)
            return str(dtype), np.zeros(array.shape, dtype)
        if how == 7:
            return "a list", array.tolist()
        if how == 8:
            return "masked", np.ma.masked_array(array)
        native = array.dtype.newbyteorder("=") if array.dtype.kind in "biu" else np.float32
        strict = array.astype(native)
        return "of another library", array_api_strict.asarray(np.ascontiguousarray(strict))


def revalued(rng: np.random.Generator, array: np.ndarray) -> tuple[str, np.ndarray]:
    """With some numbers that are rare."""
    array = array.copy()
    if array.size and array.dtype.kind not in "b":
        rare: tuple[Any, ...] = (np.nan, np.inf, -np.inf, 0.0, 1e38, -1e38, 1e-45)
        if array.dtype.kind in "iu":
            rare = (-1, 0, 127, 2**31 - 1, np.iinfo(array.dtype).max, np.iinfo(array.dtype).min)
        with np.errstate(all="ignore"):
            place = rng.integers(array.size)
            array.reshape(-1)[place] = np.asarray(one_of(rng, rare)).astype(array.dtype)
    return "with a rare number", array


def mutated(rng: np.random.Generator, value: Any) -> tuple[str, Any]:
    """What is done to an argument, and what becomes of it."""
    if rng.random() < 0.08 or not isinstance(value, np.ndarray) or value.dtype.kind in "OSUMm":
        found = anything(rng)
        return f"is a {type(found).__name__}", found
    how = rng.random()
    if how < 0.5:
        return laid_out(rng, value)
    if how < 0.58:
        return "repeated", repeated(rng, value)
    if how < 0.76:
        return reshaped(rng, value)
    if how < 0.9:
        return retyped(rng, value)
    return revalued(rng, value)


def some_dtype(rng: np.random.Generator) -> str:
    """The name of a format, float32 most often."""
    return one_of(rng, ["float32"] * 5 + list(FLOATS))


def sizes(rng: np.random.Generator, *highest: int) -> list[int]:
    """Numbers from 1 on, and rarely 0."""
    return [int(rng.integers(0 if rng.random() < 0.03 else 1, most + 1)) for most in highest]
