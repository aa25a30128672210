"""Arrays between NumPy and the other libraries."""

from __future__ import annotations

import importlib
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import is_cupy_array, is_torch_array
from numpy.typing import NDArray

from llama_layers.backends.dtypes import dtype_name


def to_numpy(array: Any) -> NDArray[Any]:
    """The numbers of any library's array as a NumPy array, bit for bit; bfloat16 as ml_dtypes'."""
    if isinstance(array, np.ndarray):
        return array
    if is_cupy_array(array):
        return np.asarray(array.get())
    if is_torch_array(array):
        array = array.detach().cpu()
        if dtype_name(array.dtype) == "bfloat16":
            torch = importlib.import_module("torch")
            integers = array.contiguous().view(torch.int16).numpy()
            return np.asarray(integers.view(ml_dtypes.bfloat16))
        return np.asarray(array.numpy())
    if dtype_name(array.dtype) != "bfloat16" and hasattr(array, "__dlpack__"):
        return np.from_dlpack(array)
    return np.asarray(array)
