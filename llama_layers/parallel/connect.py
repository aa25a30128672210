"""From what a user has, a communicator of MPI, to the ranks of a model."""

from __future__ import annotations

from typing import Any

from llama_layers.arrays.types import Namespace
from llama_layers.backends.placement import is_cupy
from llama_layers.errors import CheckpointError
from llama_layers.layers.group import Group
from llama_layers.parallel.mpi import MPIGroup, once_for
from llama_layers.parallel.nccl import NCCLGroup


def connect(parallel: object, backend: str | Namespace = "numpy") -> Group:
    """Connect the ranks of a communicator, for arrays of a backend.

    Parameters
    ----------
    parallel : mpi4py.MPI.Comm or Group
        The ranks.
    backend : {"numpy", "cupy"} or module
        Whose arrays are to be summed: CuPy's by NCCL, others by MPI.

    Returns
    -------
    Group
        The ranks, or `parallel` itself if it is a group.

    Raises
    ------
    TypeError
        If `parallel` is neither.
    ValueError
        If it is a communicator without this process.
    """
    is_comm = hasattr(parallel, "Allreduce")  # first: MPI.COMM_NULL has no rank to ask for
    if not is_comm and isinstance(parallel, Group):
        return parallel
    if not is_comm or isinstance(parallel, type):
        raise TypeError(
            f"parallel: expected a communicator of mpi4py (MPI.COMM_WORLD) or a Group, "
            f"got {type(parallel).__name__}"
        )
    comm: Any = parallel
    if not comm:
        raise ValueError(
            "parallel: expected a communicator that this process is in, got MPI.COMM_NULL"
        )
    return once_for(comm, NCCLGroup) if is_cupy(backend) else once_for(comm, MPIGroup)


def check_same(group: Group, what: dict[str, object]) -> None:
    """Raise CheckpointError on every rank unless all ranks have the same things, by their names."""
    first, *others = group.gather(what)
    for rank, found in enumerate(others, start=1):
        for name in first | found:
            if first.get(name) != found.get(name):
                raise CheckpointError(
                    f"rank {rank}: expected the model of rank 0, got another: {name} is "
                    f"{found.get(name)}, not {first.get(name)}"
                )
