"""The formats of numbers that kernels read, and how arrays must lie in memory for them."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.types import Array

FLOAT32, BFLOAT16, FLOAT16 = range(3)
BFLOAT16_PAIRS = 3  # as the product of many bfloat16 tokens takes them
KERNEL_DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}


def kernel_dtype(dtype: np.dtype) -> int | None:
    """The format of a dtype, or None if no kernel reads it; they swap no bytes."""
    return KERNEL_DTYPES.get(dtype_name(dtype)) if dtype.isnative else None


def readable(array: np.ndarray) -> int | None:
    """The format of an array that kernels can read where it lies, or None if they cannot.

    They get an address and steps, and need every number at a multiple of its size.
    """
    return kernel_dtype(array.dtype) if array.flags.aligned else None


def ready(array: Array, dtype: DTypeLike) -> np.ndarray:
    """The array, or a copy that compiled code takes: contiguous, aligned, in native order.

    Writeable, too: numba would compile everything again for an array that is not. And it does not
    look at the byte order of an array that is not aligned.
    """
    return np.require(array, dtype, ["C", "A", "W", "E"])
