"""Which work is worth a kernel, and how kernels divide it. Loads no numba."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MAX_DECODE_TOKENS = 16
"""With more tokens arithmetic is the limit, and not the reading of the weights."""
ROWS = 4
"""The rows of weights that are multiplied at once; a matrix needs at least this many."""
CHUNK = 256
"""Keys in a unit of attention of a few tokens."""

_any_size: ContextVar[bool] = ContextVar("any size", default=False)


def small(count: int, limit: int) -> bool:
    """Whether work is below a limit, and NumPy does it before numba would even be loaded."""
    return count < limit and not _any_size.get()


@contextmanager
def of_any_size() -> Iterator[None]:
    """Let kernels have work of any size, to try them."""
    token = _any_size.set(True)
    try:
        yield
    finally:
        _any_size.reset(token)
