"""What the compiled kernels and their callers agree on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llama_layers.arrays.dtypes import dtype_name

FLOAT32, BFLOAT16, FLOAT16 = range(3)
PAIRS = 3  # of bfloat16, as the product of many tokens takes them
KINDS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}


def kind_of(dtype: np.dtype[Any]) -> int | None:
    """The format of a dtype, or None if the kernels have none for it; they swap no bytes."""
    return KINDS.get(dtype_name(dtype)) if dtype.isnative else None


def readable(array: NDArray[Any]) -> int | None:
    """The format of an array that kernels read from where it lies, or None if they cannot.

    They get an address and steps. Every number is at a multiple of its size.
    """
    return kind_of(array.dtype) if array.flags.aligned else None


def ready(array: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """An array as compiled code takes it, itself or a copy: contiguous, aligned, in native order.

    Writeable, too: for what is not, numba would compile everything again, and of an array that is
    not aligned it does not look at the byte order.
    """
    return np.require(array, dtype, ["C", "A", "W", "E"])


ROWS = 4  # of weights that are multiplied at once: a matrix has as many at least
CHUNK = 256  # keys that one unit of attention takes
MOST = 16  # tokens: with more, the operations are the limit, and BLAS is at it
