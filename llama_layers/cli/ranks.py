"""Commands that mpirun starts several times: each process is a rank, and rank 0 alone prints."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from llama_layers.parallel.launcher import launched_ranks

if TYPE_CHECKING:
    from llama_layers.parallel.mpi import MPIGroup

# The commands that split a model.
PARALLEL = ("generate", "trace")


@cache
def world() -> MPIGroup | None:
    """All ranks that mpirun started; None if there is one only."""
    count = launched_ranks()
    if count == 1:
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            f"{count} ranks were started, and mpi4py cannot be imported ({error}): "
            f"pip install 'llama-layers[mpi]'"
        ) from None
    from llama_layers.parallel.mpi import MPIGroup

    return MPIGroup(MPI.COMM_WORLD)


def connect(command: str) -> None:
    """Connect to the other ranks, if there are any; raise if the command cannot split a model."""
    if (group := world()) is None:
        return
    if group.rank:  # for the rest of the process
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if command not in PARALLEL:
        raise ValueError(
            f"{group.size} ranks were started: expected one, or one of the commands that split a "
            f"model ({', '.join(PARALLEL)})"
        )


def named_rank() -> str:
    """Words for this rank, to begin a message with; nothing if there is one only."""
    return "" if (group := world()) is None else f"rank {group.rank} of {group.size}: "


def end_all(status: int) -> None:
    """End all ranks: the others would wait for this one."""
    if (group := world()) is not None:
        group.abort(status)
