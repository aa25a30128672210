"""The bytes of a file as arrays of numbers, which nothing can be written in."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, dtype_name, dtype_of
from llama_layers.arrays.types import DType
from llama_layers.errors import CheckpointError

# The dtypes that hold weights: the words of safetensors and GGUF, and ours.
STORED_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
NUMPY_DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype_of(np, name)) for name in FLOATS}


def map_file(file: Path) -> NDArray[np.uint8]:
    """The bytes of a file that is not empty, read-only, paged in as they are used."""
    with file.open("rb") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def equal_bytes(first: NDArray[np.uint8], second: NDArray[np.uint8], step: int = 1 << 24) -> bool:
    """Whether two stretches of bytes of one length are equal, without an array of that length."""
    starts = range(0, first.size, step)
    return all(np.array_equal(first[i : i + step], second[i : i + step]) for i in starts)


def viewed(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as numbers of a dtype; a copy only if they are not aligned."""
    array = raw.view(NUMPY_DTYPES[dtype])
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def read_only(array: np.ndarray) -> np.ndarray:
    """The array, in which nothing can be written: as where it is a view of a file."""
    array.flags.writeable = False
    return array


def checked_dtype(dtype: str | DType) -> str:
    """The name of a dtype to load weights in; a ValueError if they cannot have it."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", dtype_name(dtype))
    if name not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(FLOATS)}, got {name!r}")
    return name


def cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Round or widen a tensor to a dtype; a CheckpointError if a finite number would overflow."""
    if array.dtype == NUMPY_DTYPES[dtype]:
        return array
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result = array.astype(NUMPY_DTYPES[dtype])
    if FLOATS[dtype].max < FLOATS[dtype_name(array.dtype)].max:
        overflowed = np.isinf(result) & ~np.isinf(array)
        if overflowed.any():
            raise CheckpointError(
                f"{name}: {float(array[overflowed][0]):g} is too large for {dtype}; "
                f"bfloat16 has the range of float32"
            )
    return result
