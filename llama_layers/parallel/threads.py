"""Ranks that are threads of one process: to test a plan without MPI, and to count what it sends."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama_layers.arrays.checks import check_count, check_finite
from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.arrays.types import ArrayT
from llama_layers.errors import shown

T = TypeVar("T")


class _StoppedError(Exception):
    """Raised on ranks that wait for one that has raised an error of its own."""


class _Meeting:
    """Where the threads leave what they have, and wait until all have come."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self.calls = [0] * size
        """How many calls each rank has begun."""
        self.given: dict[int, dict[int, Any]] = {}
        """What ranks brought to each call that is not over."""
        self.ended: dict[int, bool] = {}
        """The ranks that have ended, and whether by an error."""

    def gather(self, rank: int, value: Any) -> list[Any]:
        with self.changed:
            call = self.calls[rank]
            self.calls[rank] += 1
            here = self.given.setdefault(call, {})
            here[rank] = value
            self.changed.notify_all()
            self.changed.wait_for(lambda: self._is_over(call), self.timeout)
            if len(here) < self.size:
                raise self._why(rank, call)
            self.given.pop(call - 1, None)  # which all have left
            return [here[other] for other in range(self.size)]

    def end(self, rank: int, failed: bool) -> None:
        with self.changed:
            self.ended[rank] = failed
            self.changed.notify_all()

    def _is_over(self, call: int) -> bool:
        """Whether all ranks have come to a call, or one never will."""
        return len(self.given[call]) == self.size or any(
            failed or self.calls[rank] <= call for rank, failed in self.ended.items()
        )

    def _why(self, rank: int, call: int) -> Exception:
        """Why a rank waits no more."""
        if any(self.ended.values()):
            return _StoppedError()
        missing = [other for other in range(self.size) if other not in self.given[call]]
        if ended := [other for other in missing if other in self.ended]:
            return RuntimeError(f"rank {rank} waits for rank {ended[0]}, which has ended")
        return TimeoutError(
            f"rank {rank} waited {self.timeout:g} seconds for rank {missing[0]}; `timeout` allows "
            f"more"
        )


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

    Raises
    ------
    TypeError, ValueError
        If an argument is of a wrong type, or `size` or `timeout` is not positive.
    RuntimeError
        If a rank waits for another that has ended.
    TimeoutError
        If a rank waits longer than `timeout`.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.parallel import run_ranks
    >>> run_ranks(3, lambda group: group.all_reduce(np.float32([group.rank])))
    [array([3.], dtype=float32), array([3.], dtype=float32), array([3.], dtype=float32)]
    """
    size = check_count("size", size)
    if not callable(run):
        raise TypeError(f"run: expected a function of a group, got {type(run).__name__}")
    if check_finite("timeout", timeout) <= 0:
        raise ValueError(f"timeout: expected seconds above zero, got {shown(timeout)}")
    meeting = _Meeting(size, timeout)

    def guarded(rank: int) -> T:
        failed = True
        try:
            result = run(ThreadGroup(rank, size, meeting))
            failed = False
            return result
        finally:
            meeting.end(rank, failed)

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, _StoppedError)):
        raise error
    return [future.result() for future in futures]
