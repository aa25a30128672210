"""Arrays between libraries, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import (
    is_cupy_array,
    is_numpy_namespace,
    is_torch_namespace,
    to_device,
)

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.namespaces import is_tensor, library, namespace
from llama_layers.arrays.tracing import is_traced
from llama_layers.arrays.types import Array, Device, Namespace

# What libraries raise for a dtype, a device or a memory layout that they do not share.
_NOT_SHARED = (BufferError, RuntimeError, TypeError, ValueError)
# Libraries that check what they are given by DLPack.
_BY_DLPACK = ("cupy", "jax", "torch")


def to_namespace(array: Array, xp: Namespace, /, *, device: Device | None = None) -> Array:
    """Give an array to another library, bit for bit.

    Parameters
    ----------
    array : Array
        Of NumPy, torch, jax, CuPy or another library that follows the array API standard; of any
        dtype that both libraries have. In NumPy and CuPy, bfloat16 and the formats of 8 bits are
        those of ml_dtypes.
    xp : module
        The other library: ``numpy``, ``torch``, ``jax.numpy``, ``cupy``.
    device : device of that library, optional
        Where the result is to be; by default where the array is, if both libraries reach it, and
        else where the library puts new arrays.

    Returns
    -------
    Array, shape and dtype of array
        The array itself if it is of that library and on that device. Else memory is shared if both
        libraries allow it: then write to neither afterwards, since jax relies on its arrays never
        changing, or pass a copy. The numbers are copied where the device is another, and where an
        array of NumPy is read-only, runs backwards, is not aligned, has a foreign byte order or a
        dtype of ml_dtypes. Gradients do not flow between libraries.

    Raises
    ------
    TypeError
        If `array` is not an array or has no numbers yet (`jax.jit` traces it), `xp` is not such a
        module, or the library has no such dtype: jax has 64 bits only where they were enabled.
    ValueError
        If a device other than "cpu" is given for NumPy. Others are for the library to refuse.

    References
    ----------
    `DLPack <https://dmlc.github.io/dlpack/latest/>`_ is how libraries share memory.

    Examples
    --------
    >>> import ml_dtypes
    >>> import numpy as np
    >>> import torch  # doctest: +SKIP
    >>> from llama_layers import to_namespace
    >>> x = np.array([1.0, -0.0], ml_dtypes.bfloat16)
    >>> to_namespace(x, torch)  # doctest: +SKIP
    tensor([1., -0.], dtype=torch.bfloat16)
    >>> to_namespace(x, np) is x
    True
    """
    if not isinstance(xp, ModuleType) or not hasattr(xp, "asarray"):
        found = xp.__name__ if isinstance(xp, ModuleType) else type(xp).__name__
        raise TypeError(
            f"xp: expected the module of a library, such as numpy, torch, jax.numpy or cupy, "
            f"got {found}"
        )
    own = namespace(array=array)
    if own is None:
        raise TypeError("array: expected an array, got None")
    if is_numpy_namespace(xp) and device not in (None, "cpu"):
        raise ValueError(f"device: expected None or 'cpu' for NumPy, got {device!r}")
    moved = array if library(own) == library(xp) else _moved(array, xp)
    return moved if device is None or is_numpy_namespace(xp) else to_device(moved, device)


def _moved(array: Array, xp: Namespace) -> Array:
    """An array in another library; it raises TypeError unless the dtype stays."""
    if is_traced(array) or getattr(array, "is_meta", False):
        raise TypeError(
            "array: expected an array with numbers, got one that a compiler traces or that is on "
            "the device meta"
        )
    name = dtype_name(array.dtype)
    moved = _shared(array, xp)
    if moved is None:
        try:
            moved = from_numpy(to_numpy(array), xp)
        except TypeError:
            raise TypeError(f"array: {library(xp)} has no dtype {name}") from None
    if (found := dtype_name(moved.dtype)) != name:  # jax narrows without a word
        raise TypeError(
            f"array: {library(xp)} turns {name} into {found}: cast it, or enable {name} there"
        )
    return moved


def _shared(array: Any, xp: Namespace) -> Array | None:
    """An array in the same memory; None if the libraries do not share it."""
    if library(xp) not in _BY_DLPACK:
        return None
    if isinstance(array, np.ndarray):
        # Aligned, and one may write to it, as torch would; for steps backwards it ends the process.
        if not array.flags.behaved or min(array.strides, default=0) < 0:
            return None
    elif library(namespace(array=array)) not in _BY_DLPACK:
        return None
    try:
        return xp.from_dlpack(_plain(array) if is_tensor(array) else array)
    except _NOT_SHARED:
        return None


def to_numpy(array: Array) -> np.ndarray:
    """Any library's array as a NumPy array, bit for bit; bfloat16 is that of ml_dtypes."""
    if isinstance(array, np.ndarray):
        return array
    other: Any = array  # which has methods of its own library
    if is_cupy_array(other):
        return np.asarray(other.get())
    if is_tensor(other):
        return _tensor_to_numpy(other)
    if not hasattr(ml_dtypes, dtype_name(other.dtype)) and hasattr(other, "__dlpack__"):
        try:
            return np.from_dlpack(other)
        except _NOT_SHARED:  # as if it is on another device
            pass
    return np.asarray(other)


def _plain(tensor: Any) -> Any:
    """A tensor without gradients, whose memory holds its numbers as they are."""
    return tensor.detach().resolve_conj().resolve_neg()


def _tensor_to_numpy(tensor: Any) -> np.ndarray:
    import torch

    functions: Any = torch._C  # the only way to the numbers that torch.func.grad and jvp wrap
    if functions._functorch.is_gradtrackingtensor(tensor):
        with functions._DisableFuncTorch():
            return _tensor_to_numpy(functions._functorch.get_unwrapped(tensor))
    tensor = _plain(tensor).cpu()
    name = dtype_name(tensor.dtype)
    if not hasattr(ml_dtypes, name):
        return np.asarray(tensor.numpy())
    integers = tensor.contiguous().view(torch.uint8 if tensor.itemsize == 1 else torch.int16)
    return np.asarray(integers.numpy().view(getattr(ml_dtypes, name)))


def from_numpy(array: np.ndarray, xp: Namespace, device: Device | None = None) -> Array:
    """A NumPy array as another library's array, bit for bit, in memory of its own.

    For NumPy's own namespace it is the array itself.
    """
    if is_numpy_namespace(xp):
        return array
    options = {} if device is None else {"device": device}  # which cupy's own function lacks
    copied = array.astype(array.dtype.newbyteorder("="), order="C")
    name = dtype_name(array.dtype)
    if is_torch_namespace(xp) and hasattr(ml_dtypes, name):
        if not hasattr(xp, name):
            raise TypeError(f"torch has no dtype {name}")
        integers = copied.view(np.uint8 if copied.itemsize == 1 else np.int16)
        return xp.asarray(integers, **options).view(getattr(xp, name))
    return xp.asarray(copied, **options)


def writable_like(array: Array, others: Iterable[Array]) -> Array:
    """A new array, read-only if one of the others is: of NumPy's, since no other library tells."""
    if isinstance(array, np.ndarray):
        array.flags.writeable = all(np.asarray(other).flags.writeable for other in others)
    return array
