"""NVIDIA's cuPyNumeric, a NumPy on many GPUs and computers, with names of the array API standard.

It has NumPy's names of before the standard, no argument ``device``, and no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from llama_layers.arrays.types import Array, Device, DType, Namespace


class _Standard(ModuleType):
    """A module, and what the layers need besides."""

    def __init__(self, module: Namespace) -> None:
        super().__init__(module.__name__)
        self._module: Any = module
        self.bool = np.dtype(np.bool_)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def astype(self, x: Any, dtype: DType, /, *, copy: bool = True) -> Array:
        """Cast an array."""
        return x if x.dtype == dtype and not copy else x.astype(dtype)

    def asarray(
        self, x: Any, *, dtype: DType | None = None, device: Device = None, copy: Any = None
    ) -> Array:
        """Make an array of numbers, or of another array."""
        return (self._module.array if copy else self._module.asarray)(x, dtype=dtype)

    def cumulative_sum(self, x: Array, /, *, axis: int, dtype: DType | None = None) -> Array:
        """Add up along an axis."""
        return self._module.cumsum(x, axis=axis, dtype=dtype)


def _anywhere(name: str) -> Callable[..., Array]:
    """A function of the module without the argument ``device``: the library places its arrays."""

    def make(self: _Standard, *args: Any, device: Device = None, **kwargs: Any) -> Array:
        return getattr(self._module, name)(*args, **kwargs)

    return make


for _name in ("arange", "ones", "zeros"):
    setattr(_Standard, _name, _anywhere(_name))


@cache
def standard(module: Namespace) -> Namespace:
    """Give a module the names of the standard: always the same one for the same module."""
    return _Standard(module)
