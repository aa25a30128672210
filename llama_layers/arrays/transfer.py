"""Arrays between NumPy and the other libraries."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import (
    is_cupy_array,
    is_numpy_namespace,
    is_torch_array,
    is_torch_namespace,
)
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import dtype_name


def to_numpy(array: Any) -> NDArray[Any]:
    """Any library's array as a NumPy array, bit for bit; bfloat16 is that of ml_dtypes."""
    if isinstance(array, np.ndarray):
        return array
    if is_cupy_array(array):
        return np.asarray(array.get())
    if is_torch_array(array):
        array = array.detach().cpu()
        if dtype_name(array.dtype) == "bfloat16":
            import torch

            integers = array.contiguous().view(torch.int16).numpy()
            return np.asarray(integers.view(ml_dtypes.bfloat16))
        return np.asarray(array.numpy())
    if dtype_name(array.dtype) != "bfloat16" and hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    return np.asarray(array)


def from_numpy(array: NDArray[Any], xp: Any, device: Any = None) -> Any:
    """A NumPy array as another library's array, bit for bit, in memory of its own.

    For NumPy's own namespace it is the array itself.
    """
    if is_numpy_namespace(xp):
        return array
    if is_torch_namespace(xp) and dtype_name(array.dtype) == "bfloat16":
        return xp.asarray(array.view(np.int16).copy(), device=device).view(xp.bfloat16)
    return xp.asarray(array.copy(), device=device)
