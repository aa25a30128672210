"""Ranks that are processes, started by mpirun and connected by mpi4py.

mpi4py: L. Dalcin and Y.-L. L. Fang, "mpi4py: Status Update After 12 Years of Development",
Computing in Science & Engineering 23(4), 2021.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from array_api_compat import device

from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import ArrayT
from llama_layers.errors import one_line

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class MPIGroup:
    """The ranks of an MPI communicator.

    An exception that ends one of them ends them all: the others would wait for it forever.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks. Messages go over a copy of it, so that they cannot meet others of yours.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm.Dup()
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        end_together(self)

    def all_reduce(self, array: ArrayT, /) -> ArrayT:
        """Sum the arrays of all ranks; every rank gets the same bits."""
        sent = np.ascontiguousarray(to_numpy(array))
        received = np.empty_like(sent)
        self._comm.Allreduce(sent, received)
        return from_numpy(received, namespace(array=array), device(array))

    def broadcast(self, value: T, /) -> T:
        """Give the value of rank 0 to every rank."""
        return self._comm.bcast(value)

    def gather(self, value: T, /) -> list[T]:
        """Give every rank the values of all ranks."""
        return self._comm.allgather(value)

    def abort(self, status: int = 1) -> None:
        """End the processes of all ranks."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(status)


def end_together(group: MPIGroup) -> None:
    """Let an exception that nothing catches end all ranks, after its traceback was printed."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        usual(kind, error, trace)
        print(
            f"rank {group.rank} of {group.size} failed: {kind.__name__}: {one_line(str(error))}",
            file=sys.stderr,
        )
        group.abort()

    if group.size > 1:
        sys.excepthook = hook
