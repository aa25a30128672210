"""What stands in for cuPyNumeric: NumPy's functions without those that cuPyNumeric lacks.

The lists are those of cuPyNumeric 26.06, looked up there by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

LACKS = frozenset(
    "astype isdtype matrix_transpose vecdot cumulative_sum pow sigmoid result_type bool unstack "
    "bfloat16".split()
)


class Module(ModuleType):
    """The module."""

    def __getattr__(self, name: str) -> Any:
        if name in LACKS or name.startswith("__"):
            raise AttributeError(f"module 'cupynumeric' has no attribute {name!r}")
        found = getattr(np, name)
        return found if isinstance(found, type | float | np.dtype) else _ours(found)


module = Module("cupynumeric")


class ndarray:  # noqa: N801
    """An array, which is none of NumPy's."""

    device = "cpu"  # as cuPyNumeric says, wherever its parts are
    __array_ufunc__ = None

    def __init__(self, numbers: np.ndarray) -> None:
        if numbers.dtype.kind == "V":  # of ml_dtypes
            raise TypeError(f"cuPyNumeric does not support dtype={numbers.dtype}")
        self._numbers = numbers

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        return module

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.asarray(self._numbers, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._numbers, name)
        return _ours(found) if callable(found) and name != "dtype" else _wrapped(found)

    def __getitem__(self, key: Any) -> Any:
        return _wrapped(self._numbers[_unwrapped(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._numbers[_unwrapped(key)] = _unwrapped(value)

    def __len__(self) -> int:
        return len(self._numbers)

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def __int__(self) -> int:
        return int(self._numbers)

    def __index__(self) -> int:
        return self._numbers.__index__()

    def __float__(self) -> float:
        return float(self._numbers)

    __hash__ = None  # type: ignore[assignment]


def _operator(name: str) -> Callable[..., Any]:
    def call(self: ndarray, *others: Any) -> Any:
        return _ours(getattr(self._numbers, name))(*others)

    return call


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv floordiv mod pow matmul neg abs and or xor invert "
    "lt le gt ge eq ne"
).split():
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _wrapped(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_wrapped, value))
    return ndarray(np.asarray(value)) if isinstance(value, np.ndarray | np.generic) else value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_unwrapped, value))
    return value._numbers if isinstance(value, ndarray) else value


def _ours(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for lacking in ("device", *["copy"] * (function is np.asarray)):
            if lacking in kwargs:
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {lacking!r}"
                )
        return _wrapped(function(*map(_unwrapped, args), **_unwrapped_values(kwargs)))

    return call


def _unwrapped_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: _unwrapped(value) for name, value in kwargs.items()}
