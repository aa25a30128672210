"""Numbers as arguments: those of Python and of NumPy, and no bools."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, which a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> None:
    """Refuse what is no positive integer."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_number(name: str, value: Any) -> None:
    """Refuse what is no real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
