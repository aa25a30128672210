"""Weights rounded or widened to another dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.checkpoint.opened import NUMPY_DTYPES
from llama_layers.errors import CheckpointError


def cast(name: str, array: NDArray[Any], dtype: str | None) -> NDArray[Any]:
    """Round or widen a tensor to a dtype; a CheckpointError if a finite number would overflow."""
    if dtype is None or array.dtype == NUMPY_DTYPES[dtype]:
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


def checked_dtype(dtype: Any) -> str:
    """The name of a dtype to load weights in; a ValueError if it is none."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", dtype_name(dtype))
    if name not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(FLOATS)}, got {name!r}")
    return name
