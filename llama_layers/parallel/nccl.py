"""Ranks that have a GPU each: NCCL sums on the GPUs, and MPI does the rest.

CuPy's interface: `cupy.cuda.nccl <https://docs.cupy.dev/en/stable/reference/cuda.html#nccl>`_.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.types import ArrayT
from llama_layers.backends.libraries import cupy
from llama_layers.backends.placement import cupy_device
from llama_layers.errors import BackendError, one_line
from llama_layers.parallel.mpi import MPIGroup

if TYPE_CHECKING:
    from mpi4py import MPI


class NCCLGroup(MPIGroup):
    """The ranks of an MPI communicator, each with a GPU of its computer.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks. Those of one computer take the GPUs that they see in turn; that of a rank
        becomes the current one.

    Raises
    ------
    BackendError
        If CuPy finds no NCCL, or NCCL cannot connect the GPUs.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        super().__init__(comm)
        nccl: Any = cupy().cuda.nccl
        if not nccl.available:
            raise BackendError(
                "parallel: CuPy finds no NCCL: pip install nvidia-nccl-cu12, or nvidia-nccl-cu13, "
                "whichever CUDA this CuPy is for"
            )
        place, ranks = self.here()
        count = cupy().cuda.runtime.getDeviceCount()
        self.device: int = place % max(1, count)
        cupy_device(self.device).use()  # streams, and what a model computes, are on the current one
        name = self.broadcast(nccl.get_unique_id() if self.rank == 0 else None)
        try:
            self._nccl = nccl.NcclCommunicator(self.size, name, self.rank)
        except RuntimeError as error:  # two ranks with one GPU, for example
            raise BackendError(
                f"parallel: NCCL cannot connect the GPUs; ranks of this computer: {ranks}, GPUs "
                f"that this one sees: {count}; each needs one of its own: {one_line(str(error))}"
            ) from error
        self._dtypes = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        self._sum = nccl.NCCL_SUM

    def all_reduce(self, array: ArrayT, /) -> ArrayT:
        """Sum the arrays of all ranks on the current stream; every rank gets the same bits.

        The sum is in order with what the stream does before and after. Nobody waits for it here:
        CuPy gives the memory of `array` to later work of the same stream only.
        """
        self.calls += 1
        sent: Any = cupy().ascontiguousarray(array)
        received: Any = cupy().empty_like(sent)
        kind, stream = self._dtypes[dtype_name(sent.dtype)], cupy().cuda.get_current_stream()
        self._nccl.allReduce(
            sent.data.ptr, received.data.ptr, sent.size, kind, self._sum, stream.ptr
        )
        return received
