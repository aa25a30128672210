"""Threads that run one compiled kernel together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


class Team:
    """The calling thread and others, which sleep between kernels.

    OpenBLAS's own threads spin for a while after each product; so would these, if they were kept
    awake, and each would take the other's cores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._others: ThreadPoolExecutor | None = None
        self._size = 1
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """A forked child has none of the threads."""
        self._lock = threading.Lock()
        self._others, self._size = None, 1

    def run(self, size: int, kernel: Callable[..., None], *arguments: Any) -> None:
        """Call ``kernel(thread, size, *arguments)`` in so many threads at once."""
        with self._lock:  # kernels whose threads wait for each other need all of them
            waiting = [self._submit(size, kernel, t, arguments) for t in range(1, size)]
            kernel(0, size, *arguments)
            for future in waiting:
                future.result()

    def _submit(
        self, size: int, kernel: Callable[..., None], thread: int, arguments: tuple[Any, ...]
    ) -> Future[None]:
        if self._others is None or self._size < size:
            if self._others is not None:
                self._others.shutdown()
            self._others, self._size = ThreadPoolExecutor(size - 1, "llama_layers"), size
        return self._others.submit(kernel, thread, size, *arguments)


TEAM = Team()


def threads() -> int:
    """As many as NumPy's BLAS uses now, so that its environment variables and limits count."""
    blas = _numpy_blas()
    return int(blas.num_threads) if blas else os.cpu_count() or 1


@cache
def _numpy_blas() -> Any:
    """The library that NumPy, which is loaded by now, multiplies with; None if it is unknown."""
    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return next(iter(found), None)
