"""The end of a rank of MPI: if others need it, theirs too, instead of waiting forever.

MPI itself ends all ranks when one dies of a signal. A Python program that raises or calls
``sys.exit`` ends in ``MPI_Finalize``, which waits for the other ranks, as they wait for it.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING

from llama_layers.errors import CheckpointError, ConfigError, TraceError, one_line
from llama_layers.parallel.launcher import wait_for_rank_0

if TYPE_CHECKING:
    from mpi4py import MPI

FILE_ERRORS = (CheckpointError, ConfigError, TraceError)
LOOK = 0.5
"""Seconds between two looks at whether a rank has ended."""
GRACE = 0.3
"""Seconds in which a launcher passes on what ranks said: it drops the rest when they end."""


def abort(status: int) -> None:
    """End the processes of all ranks, those outside a group too."""
    from mpi4py import MPI

    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    time.sleep(GRACE)
    MPI.COMM_WORLD.Abort(status)


@cache
def end_together() -> None:
    """Let an exception that nothing catches end all ranks, after its traceback was printed."""
    from mpi4py import MPI

    usual, rank, size = sys.excepthook, MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        wait_for_rank_0()
        usual(kind, error, _outside(trace) if isinstance(error, FILE_ERRORS) else trace)
        said = one_line(f"{kind.__name__}: {error}".removesuffix(": "))
        print(f"rank {rank} of {size} failed: {said}", file=sys.stderr)
        abort(1)

    sys.excepthook = hook


def _outside(trace: TracebackType | None) -> TracebackType | None:
    """A traceback up to the call of this package, whose message says what is wrong with a file."""
    last = trace
    while last is not None and last.tb_next is not None:
        if last.tb_next.tb_frame.f_globals.get("__name__", "").startswith("llama_layers."):
            last.tb_next = None
        last = last.tb_next
    return trace


def watch(comm: MPI.Comm, calls: Callable[[], int]) -> None:
    """Let a rank that ends say so, and those that wait for it end all ranks.

    It says how many calls it took part in: a rank that is in a later one would wait forever. One
    that has ended while the others do something else hinders nobody.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks; no messages but those of this function are sent between two of them.
    calls : callable
        ``calls()`` is the number of calls so far that all ranks take part in, with that in which
        this rank is now.
    """
    from mpi4py import MPI

    others = [rank for rank in range(comm.Get_size()) if rank != comm.Get_rank()]
    ended: dict[int, int] = {}
    leaving = threading.Event()

    def look() -> None:
        while not leaving.wait(LOOK) and not MPI.Is_finalized():
            status = MPI.Status()
            while comm.Iprobe(status=status):
                ended[status.source] = comm.recv(source=status.source)
            for rank, taken in ended.items():
                if taken < calls():
                    said = f"rank {comm.Get_rank()} of {comm.Get_size()} waits for rank {rank}, "
                    print(f"{said}which has ended", file=sys.__stderr__, flush=True)
                    abort(1)

    def leave() -> None:
        leaving.set()
        watcher.join()
        if not MPI.Is_finalized():
            sent = [comm.isend(calls(), rank) for rank in others]
            for rank in others:
                if rank not in ended:
                    comm.recv(source=rank)
            MPI.Request.waitall(sent)

    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:  # otherwise one thread alone may call MPI
        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        atexit.register(leave)
