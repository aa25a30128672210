"""NumPy arrays to the library and device that a caller asks for."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import is_cupy_namespace, is_numpy_namespace

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import from_numpy
from llama_layers.arrays.types import Array, Device, Namespace
from llama_layers.backends.cupy.detect import gpu_problem
from llama_layers.backends.libraries import cupy
from llama_layers.errors import BackendError, shown


def placement(
    backend: str | Namespace, device: Device | None = None
) -> Callable[[np.ndarray], Array]:
    """A function that moves NumPy arrays to a backend's device without changing a bit."""
    if isinstance(backend, str) and backend not in ("numpy", "cupy"):
        raise ValueError(f"backend: expected 'numpy', 'cupy' or a module, got {shown(backend)}")
    if not isinstance(backend, str) and not hasattr(backend, "asarray"):
        raise TypeError(f"backend: expected 'numpy', 'cupy' or a module, got {shown(backend)}")
    if is_cupy(backend):
        return _to_cupy(device)
    if backend == "numpy" or (isinstance(backend, ModuleType) and is_numpy_namespace(backend)):
        if device not in (None, "cpu"):
            raise ValueError(f"device: expected None or 'cpu' for NumPy, got {shown(device)}")
        return lambda array: array
    assert not isinstance(backend, str)  # both have returned
    return _to_module(backend, device)


def is_cupy(backend: str | Namespace) -> bool:
    """Whether a backend's arrays are CuPy's."""
    return backend == "cupy" or (isinstance(backend, ModuleType) and is_cupy_namespace(backend))


def cupy_device(device: Device | None) -> Any:
    """The ``cupy.cuda.Device`` of a number, or the current one; an error if none can compute."""
    if (problem := gpu_problem()) is not None:
        raise BackendError(f"backend 'cupy': {problem}")
    count = cupy().cuda.runtime.getDeviceCount()
    if device is not None and (not isinstance(device, int) or not 0 <= device < count):
        raise ValueError(
            f"device: expected None or an id from 0 to {count - 1}, got {shown(device)}"
        )
    return cupy().cuda.Device(device)


def _to_cupy(device: Device | None) -> Callable[[np.ndarray], Array]:
    where = cupy_device(device)

    def place(array: np.ndarray) -> Array:
        with where:
            return cupy().asarray(array)

    return place


def _to_module(xp: Namespace, device: Device | None) -> Callable[[np.ndarray], Array]:
    standard = namespace(backend=xp.asarray(0.0))  # dask.array alone knows no device

    def place(array: np.ndarray) -> Array:
        moved = from_numpy(array, standard, device)
        if dtype_name(moved.dtype) != dtype_name(array.dtype):  # jax narrows without a word
            raise TypeError(
                f"backend {xp.__name__}: turned {dtype_name(array.dtype)} into "
                f"{dtype_name(moved.dtype)}; pass dtype={dtype_name(moved.dtype)!r}, or enable "
                f"the wider one there"
            )
        return moved

    return place
