"""The array library that arrays come from."""

from __future__ import annotations

import sys
from typing import Any

import array_api_compat
import numpy as np
from array_api_compat import array_namespace

from llama_layers.arrays.cupynumeric import standard
from llama_layers.arrays.pytrees import offer_to_jax
from llama_layers.arrays.types import Array, Device, Namespace

# Tuples, since torch.compile cannot read a union of NumPy's types.
_OF_NUMPY = (np.ndarray, np.generic)
_OF_OTHER_RULES = (np.ma.MaskedArray, np.matrix)


def namespace(**arrays: Array | None) -> Namespace:
    """The one array namespace and device that the named arrays share.

    ``None`` stands for an argument that is not given. Raises TypeError if an argument is not an
    array of numbers side by side or is of another library than the first, ValueError if it lies on
    another device.
    """
    first = ""
    xp: Any = None
    for name, array in arrays.items():
        if array is None:
            continue
        own = np if type(array) is np.ndarray else _own_namespace(name, array)
        if xp is None:
            first, xp = name, own
        elif own is not xp:
            raise TypeError(
                f"{name}: expected an array of the same library as {first}, "
                f"{library(xp)}, got one of {library(own)}"
            )
        elif xp is not np:
            _check_device(name, device(array), first, device(arrays[first]))
    return xp


def _own_namespace(name: str, array: Any) -> Namespace:
    # NumPy follows the standard by itself, and its compatible wrapper loads slowly.
    if isinstance(array, _OF_NUMPY):
        if isinstance(array, _OF_OTHER_RULES):
            raise TypeError(_not_an_array(name, array))
        return np
    if is_tensor(array):
        check_dense(name, array)
        return _namespace_of_tensors(name)
    try:
        own = array_namespace(array)
    except TypeError:
        raise TypeError(_not_an_array(name, array)) from None
    offer_to_jax()
    return standard(own) if own.__name__ == "cupynumeric" else own


def _not_an_array(name: str, value: object) -> str:
    kind = type(value)
    # Many libraries call their arrays Tensor.
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}."
    return (
        f"{name}: expected an array of NumPy, CuPy or another array API library, "
        f"got {where}{kind.__name__}"
    )


def is_tensor(value: object) -> bool:
    """Whether a value is torch's tensor, of any class; torch is not imported for it."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def check_dense(name: str, tensor: Any) -> None:
    """Raise TypeError unless torch's tensor holds its numbers side by side."""
    if tensor.is_nested or str(tensor.layout) != "torch.strided":
        kind = "a nested tensor" if tensor.is_nested else f"the layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def _namespace_of_tensors(name: str) -> Namespace:
    try:
        import array_api_compat.torch as xp  # not by `array_namespace`: see `device`
    except (ImportError, AttributeError) as error:  # of a version that has not all of the standard
        version = getattr(sys.modules["torch"], "__version__", "of an unknown version")
        raise TypeError(
            f"{name}: expected a tensor of a newer torch, got one of torch {version}, which "
            f"array-api-compat {array_api_compat.__version__} cannot use ({error})"
        ) from None
    return xp


def device(array: Any) -> Device | None:
    """The device that an array lies on; None if jax traces it."""
    # Asked of a tensor itself, since torch.compile warns of array-api-compat's caches.
    return array.device if is_tensor(array) else array_api_compat.device(array)


def _check_device(name: str, own: Device | None, first: str, expected: Device | None) -> None:
    if own != expected and None not in (own, expected):  # traced arrays have no device yet
        raise ValueError(f"{name}: expected to be on the device of {first}, {expected}, got {own}")


def library(xp: Namespace) -> str:
    """The name of a namespace's library: 'numpy', 'cupy', 'torch', ..."""
    return str(xp.__name__).removeprefix("array_api_compat.").partition(".")[0]
