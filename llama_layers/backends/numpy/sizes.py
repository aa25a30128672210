"""Which work is worth a kernel: not what NumPy does before numba is even loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_any_size: ContextVar[bool] = ContextVar("any size", default=False)


def small(count: int, limit: int) -> bool:
    """Whether work of a size below the limit is left to NumPy."""
    return count < limit and not _any_size.get()


@contextmanager
def of_any_size() -> Iterator[None]:
    """Let kernels have work of any size, to try them."""
    token = _any_size.set(True)
    try:
        yield
    finally:
        _any_size.reset(token)
