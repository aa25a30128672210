"""NumPy arrays as torch tensors of their own."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray


def tensor(array: NDArray[Any]) -> Any:
    """A copy, of the same dtype; torch knows no NumPy array of bfloat16."""
    torch: Any = importlib.import_module("torch")
    with warnings.catch_warnings():  # that torch could write to a file mapped read-only
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).clone()
        return torch.from_numpy(array).clone()


def to_numpy(result: Any) -> NDArray[Any]:
    """Numbers, widened to float32."""
    numbers: NDArray[Any] = result.detach().float().numpy()
    return numbers
