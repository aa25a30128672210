"""The array library that arrays come from."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_cupy_namespace, is_numpy_namespace

from llama_layers.arrays.cupynumeric import standard
from llama_layers.arrays.types import Array, Device, Namespace


def namespace(**arrays: Array | None) -> Namespace:
    """The one array namespace and device that the named arrays share.

    ``None`` stands for an argument that is not given. Raises TypeError if an argument is not an
    array or is of another library than the first, ValueError if it lies on another device.
    """
    first = ""
    xp: Any = None
    for name, array in arrays.items():
        if array is None:
            continue
        try:
            if isinstance(array, np.ma.MaskedArray | np.matrix):  # which have other rules
                raise TypeError
            # NumPy follows the standard by itself, and its compatible wrapper loads slowly.
            own = np if isinstance(array, np.ndarray | np.generic) else array_namespace(array)
            if own.__name__ == "cupynumeric":
                own = standard(own)
        except TypeError:
            raise TypeError(
                f"{name}: expected an array of NumPy, CuPy or another array API library, "
                f"got {type(array).__name__}"
            ) from None
        if xp is None:
            first, xp = name, own
        elif own is not xp:
            raise TypeError(
                f"{name}: expected an array of the same library as {first}, "
                f"{library(xp)}, got one of {library(own)}"
            )
        elif not is_numpy_namespace(xp):
            _check_device(name, device(array), first, device(arrays[first]))
    return xp


def _check_device(name: str, own: Device | None, first: str, expected: Device | None) -> None:
    if own != expected and None not in (own, expected):  # traced arrays have no device yet
        raise ValueError(f"{name}: expected to be on the device of {first}, {expected}, got {own}")


def library(xp: Namespace) -> str:
    """The name of a namespace's library: 'numpy', 'cupy', 'torch', ..."""
    if is_numpy_namespace(xp):
        return "numpy"
    if is_cupy_namespace(xp):
        return "cupy"
    return str(xp.__name__).removeprefix("array_api_compat.").partition(".")[0]
