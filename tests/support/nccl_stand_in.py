"""What stands in for NCCL: sums over ranks that share one process, on streams of the stand-in.

As NCCL does, a call gives the stream its work and returns. Nothing is read or summed before the
streams of all ranks have come to it.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.cupy_memory import Memory
from tests.support.cupy_streams import Stream

FLOAT32, FLOAT64, SUM = 7, 8, 0
_DTYPES = {FLOAT32: np.float32, FLOAT64: np.float64}


@dataclass
class _Call:
    """One rank's part of a sum."""

    send: int
    receive: int
    run: Callable[[], None]
    alive: list[Memory]
    """What the addresses are in: CuPy's pool gives it to later work of the stream only."""


@dataclass
class World:
    """The ranks of one communicator, and the sums that they asked for, each in order."""

    size: int
    meet: Callable[[], None] | None = None
    """Waits until all ranks have come, where each has a thread of its own."""
    asked: list[list[_Call]] = field(init=False)
    summed: int = 0

    def __post_init__(self) -> None:
        self.asked = [[] for _ in range(self.size)]

    def module(self) -> Any:
        """A module to use instead of ``cupy.cuda.nccl``."""
        return SimpleNamespace(
            available=True,
            NCCL_FLOAT32=FLOAT32,
            NCCL_FLOAT64=FLOAT64,
            NCCL_SUM=SUM,
            get_unique_id=lambda: tuple(range(128)),
            NcclCommunicator=self._communicator,
        )

    def _communicator(self, ndev: int, comm_id: tuple[int, ...], rank: int) -> Any:
        assert ndev == self.size
        assert comm_id == tuple(range(128)), "another communicator's"
        return SimpleNamespace(allReduce=lambda *args: self._all_reduce(rank, *args))

    def _all_reduce(
        self, rank: int, send: int, receive: int, count: int, dtype: int, op: int, stream: int
    ) -> None:
        assert op == SUM
        (on,) = (s for s in Stream.all if s.ptr == stream)
        number = len(self.asked[rank])
        place = on._given + 1

        def run() -> None:
            if self.meet is not None:
                self.meet()
            for other, calls in enumerate(self.asked):
                assert number < len(calls), f"rank {other} has not asked: a GPU would wait forever"
                calls[number].run()  # what its stream has to do before
            if self.summed == number:
                self.summed += 1
                self._sum([calls[number] for calls in self.asked], count, _DTYPES[dtype])
            if self.meet is not None:
                self.meet()

        before = (lambda: None) if self.meet is not None else lambda: on.run_until(place - 1)
        self.asked[rank].append(_Call(send, receive, before, [_memory(send), _memory(receive)]))
        on.enqueue(run)

    @staticmethod
    def _sum(calls: list[_Call], count: int, dtype: type) -> None:
        def numbers(address: int) -> np.ndarray:
            buffer = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
            return np.frombuffer(buffer, dtype)

        total = sum(numbers(call.send) for call in calls)
        for call in calls:
            numbers(call.receive)[:] = total


def _memory(address: int) -> Memory:
    """The allocation that an address is in."""
    found = (m for m in gc.get_objects() if isinstance(m, Memory))
    return next(m for m in found if m.ptr <= address <= m.ptr + m.size)


class Baton:
    """Lets one of several threads run at a time, and another when that one waits: the stand-in for
    CuPy has one current stream for all."""

    def __init__(self, size: int) -> None:
        self._lock, self._barrier = threading.Lock(), threading.Barrier(size, timeout=60)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._barrier.abort()
        self._lock.release()

    def meet(self) -> None:
        """Wait for the other threads."""
        self._lock.release()
        try:
            self._barrier.wait()
        finally:
            self._lock.acquire()
