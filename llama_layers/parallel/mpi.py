"""Ranks that are processes, started by mpirun and connected by mpi4py.

mpi4py: L. Dalcin and Y.-L. L. Fang, "mpi4py: Status Update After 12 Years of Development",
Computing in Science & Engineering 23(4), 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

import numpy as np

from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import ArrayT
from llama_layers.parallel.ending import abort, end_together, watch

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class MPIGroup:
    """The ranks of an MPI communicator.

    A rank that ends before the others are done with it ends them all: they would wait forever.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks. Messages go over a copy of it, so that they cannot meet others of yours.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm.Dup()
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.calls = 0
        """The number of calls so far that all ranks take part in."""
        if self.size > 1:
            end_together()
            watch(self._comm, lambda: self.calls)

    def all_reduce(self, array: ArrayT, /) -> ArrayT:
        """Sum the arrays of all ranks; every rank gets the same bits."""
        self.calls += 1
        sent = np.ascontiguousarray(to_numpy(array))
        received = np.empty_like(sent)
        self._comm.Allreduce(sent, received)
        summed: Any = from_numpy(received, namespace(array=array), device(array))
        return summed

    def broadcast(self, value: T, /) -> T:
        """Give the value of rank 0 to every rank."""
        self.calls += 1
        return self._comm.bcast(value)

    def gather(self, value: T, /) -> list[T]:
        """Give every rank the values of all ranks."""
        self.calls += 1
        return self._comm.allgather(value)

    def collect(self, value: T, /) -> list[T] | None:
        """Give rank 0 the values of all ranks, and the others None."""
        self.calls += 1
        return self._comm.gather(value)

    def here(self) -> tuple[int, int]:
        """Which of the ranks of this computer this is, and how many there are."""
        from mpi4py import MPI

        self.calls += 1
        comm = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        place = comm.Get_rank(), comm.Get_size()
        comm.Free()
        return place

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give the group itself, so that a copy of a model has the same ranks."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a rank of MPI cannot be pickled, nor can its part of a model: expected the other "
            "process to load its own"
        )

    def abort(self, status: int = 1) -> None:
        """End the processes of all ranks."""
        abort(status)


@cache
def _keyval(kind: Callable[[MPI.Comm], T]) -> int:
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()


def once_for(comm: MPI.Comm, kind: Callable[[MPI.Comm], T]) -> T:
    """A group of some kind, made when a communicator is first used: its models share it."""
    group: Any = comm.Get_attr(_keyval(kind))
    if group is None:
        group = kind(comm)
        comm.Set_attr(_keyval(kind), group)
    return group
