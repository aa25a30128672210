"""Ranks that are threads of one process: to test a plan without MPI, and to count what it sends."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.arrays.types import ArrayT

T = TypeVar("T")


@dataclass
class _Meeting:
    """Where the threads leave what they have, and wait until all have come."""

    size: int
    timeout: float
    values: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=self.timeout)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()  # before anyone leaves the next value
        return found


@dataclass
class ThreadGroup:
    """One rank of several that are threads; see `run_ranks`.

    Attributes
    ----------
    rank, size : int
        Which of how many.
    reduced : list of int
        The number of bytes of each array that was summed over the ranks so far.
    """

    rank: int
    size: int
    meeting: _Meeting = field(repr=False)
    reduced: list[int] = field(default_factory=list)

    def all_reduce(self, array: ArrayT, /) -> ArrayT:
        """Sum the arrays of all ranks, from the first rank to the last."""
        self.reduced.append(math.prod(array.shape) * FLOATS[dtype_name(array.dtype)].itemsize)
        first, *others = self.meeting.gather(self.rank, array)
        for other in others:
            first = first + other
        return first

    def broadcast(self, value: T, /) -> T:
        """Give the value of rank 0 to every rank."""
        return self.gather(value)[0]

    def gather(self, value: T, /) -> list[T]:
        """Give every rank the values of all ranks, as copies, as another process would get them."""
        found = self.meeting.gather(self.rank, pickle.dumps(value))
        return [value if rank == self.rank else pickle.loads(v) for rank, v in enumerate(found)]


def run_ranks(size: int, run: Callable[[ThreadGroup], T], /, *, timeout: float = 60.0) -> list[T]:
    """Run a function on some ranks at once, each in a thread of its own.

    Parameters
    ----------
    size : int
        How many ranks.
    run : callable
        ``run(group)``, called once for each rank.
    timeout : float
        Seconds that a rank waits for the others.

    Returns
    -------
    list
        What `run` gave on each rank. If it raises on one, the others stop waiting, and its error is
        raised here.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.parallel import run_ranks
    >>> run_ranks(3, lambda group: group.all_reduce(np.float32([group.rank])))
    [array([3.], dtype=float32), array([3.], dtype=float32), array([3.], dtype=float32)]
    """
    meeting = _Meeting(size, timeout)

    def guarded(rank: int) -> T:
        try:
            return run(ThreadGroup(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
