"""Commands that mpirun starts several times: each process is a rank, and rank 0 alone prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from llama_layers.errors import shown
from llama_layers.parallel.launcher import launched

if TYPE_CHECKING:
    from llama_layers.parallel.mpi import MPIGroup

# The commands that split a model, and how they are called.
PARALLEL = {"generate": "generate", "trace": "trace", "bench": "bench decode, bench prefill"}
# Options that may be others on each rank: places of files, and what is not an option.
_OWN = ("model", "output", "html", "plot", "json", "force", "command", "run")


@cache
def world() -> MPIGroup | None:
    """All ranks that mpirun started; None if there is one only."""
    _, count = launched()
    if count == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter without a library of MPI
        raise ImportError(
            f"{count} ranks were started, and mpi4py cannot be imported ({error}): "
            f"pip install 'llama-layers[mpi]'"
        ) from None
    if (found := MPI.COMM_WORLD.Get_size()) != count:
        library = " ".join(MPI.Get_library_version().splitlines()[0].split())
        raise ImportError(
            f"{count} ranks were started, and mpi4py finds {found}: expected a launcher of the "
            f"library of MPI that mpi4py uses, {library}"
        )
    from llama_layers.parallel.mpi import MPIGroup, once_for

    return once_for(MPI.COMM_WORLD, MPIGroup)


def silence() -> None:
    """Let rank 0 alone print, for the rest of the process."""
    if launched()[0]:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def connect(command: str | None, options: Mapping[str, object] | None = None) -> None:
    """Connect to the other ranks, if there are any; raise unless all can run the same command.

    It is None where a rank could not read its arguments: the others would wait for it.
    """
    rank, count = launched()
    splits = command in PARALLEL
    try:
        group = world()
    except ImportError:
        if splits:
            raise
    else:
        if group is not None:
            _check_commands(group, command, options or {})
    if count > 1 and not splits:
        if rank or command is None:  # rank 0 says why, or argparse has
            sys.exit(2)
        raise ValueError(
            f"{count} ranks were started: expected one, or one of the commands that split a "
            f"model ({', '.join(PARALLEL.values())})"
        )


def _check_commands(group: MPIGroup, command: str | None, options: Mapping[str, object]) -> None:
    """Raise ValueError on every rank unless all run the same command, with the same options."""
    given = {name: shown(value) for name, value in options.items() if name not in _OWN}
    (first, expected), *others = group.gather((command or "one with wrong arguments", given))
    for rank, (found, theirs) in enumerate(others, start=1):
        if found != first:
            raise ValueError(f"rank {rank}: expected the command of rank 0, {first}, got {found}")
        for name in expected:
            if name in theirs and theirs[name] != expected[name]:
                raise ValueError(
                    f"rank {rank}: {name.replace('_', '-')}: expected that of rank 0, "
                    f"{expected[name]}, got {theirs[name]}"
                )


def named() -> str:
    """Words for this rank, to begin a message with; nothing if there is one only."""
    rank, count = launched()
    return f"rank {rank} of {count}: " if count > 1 else ""


def end_all(status: int) -> None:
    """End all ranks, if they are connected: the others would wait for this one."""
    if launched()[1] > 1 and "mpi4py.MPI" in sys.modules:
        from llama_layers.parallel.ending import abort

        abort(status)
