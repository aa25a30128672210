"""Threads that run one compiled kernel together."""

from __future__ import annotations

import os
import threading
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController


class Team:
    """The calling thread and others, which sleep between kernels.

    OpenBLAS's own threads spin for a while after each product; so would these, if they were kept
    awake, and each would take the other's cores.

    They are daemons, so that they work for threads that go on after the main one has ended.
    """

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """A forked child has none of the threads."""
        self._lock = threading.Lock()
        self._inboxes: list[SimpleQueue[Any]] = []

    def run(
        self, size: int, kernel: Any, *arguments: Any, stop: NDArray[np.int64] | None = None
    ) -> None:
        """Call ``kernel(thread, size, *arguments)`` in so many threads at once.

        Where the threads wait for each other they look at the last number of `stop`, too. If this
        thread is interrupted, by Ctrl-C say, the others go on without it, to no purpose but to end.
        """
        with self._lock:  # kernels whose threads wait for each other need all of them
            if not getattr(kernel, "signatures", True):  # it takes long, and Ctrl-C may end it
                from numba import typeof  # loads numba, which takes a while

                kernel.compile(tuple(map(typeof, (0, size, *arguments))))
            while len(self._inboxes) < size - 1:
                fresh: SimpleQueue[Any] = SimpleQueue()
                threading.Thread(target=_work, args=(fresh,), daemon=True).start()
                self._inboxes.append(fresh)  # after that, lest there be one that nobody reads
            ended: SimpleQueue[Exception | None] = SimpleQueue()
            try:
                for thread, inbox in enumerate(self._inboxes[: size - 1], start=1):
                    inbox.put((kernel, thread, size, arguments, ended))
                kernel(0, size, *arguments)
                problems = [ended.get() for _ in range(1, size)]
            except BaseException:
                if stop is not None:
                    stop[-1] = 1
                self._wait()  # they have addresses of arrays that the caller may let go
                raise
        for problem in problems:
            if problem is not None:
                raise problem

    def _wait(self) -> None:
        """Until every thread has done what it was given."""
        ended: SimpleQueue[Exception | None] = SimpleQueue()
        for inbox in self._inboxes:
            inbox.put((lambda thread, size: None, 0, 0, (), ended))
        for _ in self._inboxes:
            ended.get()


def _work(inbox: SimpleQueue[Any]) -> None:
    """What a thread does all its life."""
    while True:
        kernel, thread, size, arguments, ended = inbox.get()
        try:
            kernel(thread, size, *arguments)
            ended.put(None)
        except Exception as error:  # for whoever called
            ended.put(error)
        del kernel, arguments, ended  # no longer than the call that they belong to


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
