"""NumPy and CuPy arrays as torch tensors."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array
from numpy.typing import NDArray


def tensor(array: Any) -> Any:
    """The same dtype and numbers: of a NumPy array as a copy, of a CuPy array where they are.

    torch knows no NumPy array of bfloat16, and is given integers.
    """
    torch: Any = importlib.import_module("torch")
    if is_cupy_array(array):
        if array.dtype.itemsize == 2:
            return shared(torch, array.view(np.int16)).view(getattr(torch, array.dtype.name))
        return shared(torch, array)
    with warnings.catch_warnings():  # that torch could write to a file mapped read-only
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).clone()
        return torch.from_numpy(array).clone()


def shared(torch: Any, array: Any) -> Any:
    """A tensor on the memory of an array on a GPU."""
    return torch.from_dlpack(array)


def to_numpy(result: Any) -> NDArray[Any]:
    """Numbers, widened to float32."""
    numbers: NDArray[Any] = result.detach().float().cpu().numpy()
    return numbers
