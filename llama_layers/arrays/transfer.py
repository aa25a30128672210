"""Arrays between NumPy and the other libraries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import (
    is_cupy_array,
    is_numpy_namespace,
    is_torch_array,
    is_torch_namespace,
)

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.types import Array, Device, Namespace


def to_numpy(array: Array) -> np.ndarray:
    """Any library's array as a NumPy array, bit for bit; bfloat16 is that of ml_dtypes."""
    if isinstance(array, np.ndarray):
        return array
    other: Any = array  # which has methods of its own library
    if is_cupy_array(other):
        return np.asarray(other.get())
    if is_torch_array(other):
        other = other.detach().cpu()
        if dtype_name(other.dtype) == "bfloat16":
            import torch

            integers = other.contiguous().view(torch.int16).numpy()
            return np.asarray(integers.view(ml_dtypes.bfloat16))
        return np.asarray(other.numpy())
    if dtype_name(other.dtype) != "bfloat16" and hasattr(other, "__dlpack__"):
        return np.from_dlpack(other)
    return np.asarray(other)


def from_numpy(array: np.ndarray, xp: Namespace, device: Device | None = None) -> Array:
    """A NumPy array as another library's array, bit for bit, in memory of its own.

    For NumPy's own namespace it is the array itself.
    """
    if is_numpy_namespace(xp):
        return array
    if is_torch_namespace(xp) and dtype_name(array.dtype) == "bfloat16":
        return xp.asarray(array.view(np.int16).copy(), device=device).view(xp.bfloat16)
    return xp.asarray(array.copy(), device=device)


def writable_like(array: Array, others: Iterable[Array]) -> Array:
    """A new array, read-only if one of the others is: of NumPy's, since no other library tells."""
    if isinstance(array, np.ndarray):
        array.flags.writeable = all(np.asarray(other).flags.writeable for other in others)
    return array


def detached(name: str, array: Any) -> Any:
    """An array as it is; a tensor of torch without its gradients. It must hold dense data."""
    if not is_torch_array(array):
        return array
    if array.is_meta:  # as where accelerate keeps the weights elsewhere
        raise TypeError(f"{name}: expected a tensor with data, got one on the device meta")
    if array.is_nested or str(array.layout) != "torch.strided":
        kind = "a nested tensor" if array.is_nested else f"the layout {array.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")
    return array.detach()
