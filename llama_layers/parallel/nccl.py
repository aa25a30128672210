"""Ranks that have a GPU each: NCCL sums on the GPUs, and MPI does the rest.

CuPy's interface: `cupy.cuda.nccl <https://docs.cupy.dev/en/stable/reference/cuda.html#nccl>`_.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.types import ArrayT
from llama_layers.backends.libraries import cupy
from llama_layers.backends.placement import cupy_device
from llama_layers.parallel.mpi import MPIGroup

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class NCCLGroup:
    """The ranks of an MPI communicator, each with a GPU of its computer.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks. Those of one computer take its GPUs in turn.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        from mpi4py import MPI

        self._mpi = MPIGroup(comm)
        self.rank, self.size = self._mpi.rank, self._mpi.size
        here = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
        count = cupy().cuda.runtime.getDeviceCount()
        self.device: int = here % max(1, count)
        nccl: Any = cupy().cuda.nccl
        with cupy_device(self.device):
            name = self._mpi.broadcast(nccl.get_unique_id() if self.rank == 0 else None)
            self._nccl = nccl.NcclCommunicator(self.size, name, self.rank)
        self._dtypes = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        self._sum = nccl.NCCL_SUM

    def all_reduce(self, array: ArrayT, /) -> ArrayT:
        """Sum the arrays of all ranks on the current stream; every rank gets the same bits."""
        sent: Any = cupy().ascontiguousarray(array)
        received: Any = cupy().empty_like(sent)
        kind, stream = self._dtypes[dtype_name(sent.dtype)], cupy().cuda.get_current_stream()
        self._nccl.allReduce(
            sent.data.ptr, received.data.ptr, sent.size, kind, self._sum, stream.ptr
        )
        return received

    def broadcast(self, value: T, /) -> T:
        """Give the value of rank 0 to every rank, by way of main memory."""
        return self._mpi.broadcast(value)

    def gather(self, value: T, /) -> list[T]:
        """Give every rank the values of all ranks, by way of main memory."""
        return self._mpi.gather(value)

    def abort(self, status: int = 1) -> None:
        """End the processes of all ranks."""
        self._mpi.abort(status)
