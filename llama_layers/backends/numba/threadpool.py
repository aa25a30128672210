"""Threads that run one compiled kernel together."""

from __future__ import annotations

import os
import threading
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ThreadPool:
    """The calling thread and others, which sleep between kernels.

    OpenBLAS's own threads spin for a while after each product. If these were kept awake they would
    do the same, and each would take the other's cores.

    They are daemons, so that they serve threads that go on after the main one has ended.
    """

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Begin without threads: a forked child has none of its parent's."""
        self._lock = threading.Lock()
        self._inboxes: list[SimpleQueue[Any]] = []

    def run(
        self, size: int, kernel: Any, *arguments: Any, stop: NDArray[np.int64] | None = None
    ) -> None:
        """Call ``kernel(thread, size, *arguments)`` in `size` threads at once.

        Threads that wait for each other also watch the last number of `stop`. If this thread is
        interrupted, by Ctrl-C say, it is set, and the others end without having finished.
        """
        with self._lock:  # kernels whose threads wait for each other need all of them
            if not getattr(kernel, "signatures", True):  # it takes long, and Ctrl-C may end it
                from numba import typeof  # loads numba, which takes a while

                kernel.compile(tuple(map(typeof, (0, size, *arguments))))
            while len(self._inboxes) < size - 1:
                fresh: SimpleQueue[Any] = SimpleQueue()
                threading.Thread(target=_work, args=(fresh,), daemon=True).start()
                self._inboxes.append(fresh)  # not before its thread has started to read it
            ended: SimpleQueue[Exception | None] = SimpleQueue()
            try:
                for thread, inbox in enumerate(self._inboxes[: size - 1], start=1):
                    inbox.put((kernel, thread, size, arguments, ended))
                kernel(0, size, *arguments)
                problems = [ended.get() for _ in range(1, size)]
            except BaseException:
                if stop is not None:
                    stop[-1] = 1
                self._wait()  # they have addresses of arrays that the caller may free
                raise
        for problem in problems:
            if problem is not None:
                raise problem

    def _wait(self) -> None:
        """Wait until every thread has done what it was given."""
        ended: SimpleQueue[Exception | None] = SimpleQueue()
        for inbox in self._inboxes:
            inbox.put((lambda thread, size: None, 0, 0, (), ended))
        for _ in self._inboxes:
            ended.get()


def _work(inbox: SimpleQueue[Any]) -> None:
    """Run the kernels of one thread, for ever."""
    while True:
        kernel, thread, size, arguments, ended = inbox.get()
        try:
            kernel(thread, size, *arguments)
            ended.put(None)
        except Exception as error:  # for the caller
            ended.put(error)
        del kernel, arguments, ended  # no longer than the call that they belong to


THREADS = ThreadPool()


def num_threads() -> int:
    """The threads that NumPy's BLAS uses now, so that its variables and limits count here, too."""
    blas = _numpy_blas()
    return int(blas.num_threads) if blas else os.cpu_count() or 1


@cache
def _numpy_blas() -> Any:
    """The library that NumPy, which is loaded by now, multiplies with; None if it is unknown."""
    from threadpoolctl import ThreadpoolController

    found = ThreadpoolController().select(user_api="blas").lib_controllers
    return next(iter(found), None)
