"""Whether a launcher of MPI started this process, as one of several."""

from __future__ import annotations

import os

# What MPICH and its relatives, Intel's MPI among them, Open MPI, and Slurm's srun set: how many
# processes there are, and which of them this is.
SIZES_AND_RANKS = {
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}


def launched() -> tuple[int, int]:
    """Return which rank this is, and of how many, as the launcher says; 0 of 1 without one."""
    for size, rank in SIZES_AND_RANKS.items():
        found = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(value.isdecimal() for value in found):
            return int(found[0]), max(1, int(found[1]))
    return 0, 1
