"""Whether a launcher of MPI started this process, as one of several."""

from __future__ import annotations

import os
import time

# What MPICH and its relatives, Intel's MPI among them, Open MPI, and Slurm's srun set: how many
# processes there are, and which of them this is.
SIZES_AND_RANKS = {
    "PMI_SIZE": "PMI_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
}
# Seconds that rank 0 has to say what is wrong before others do.
SAYS = 1.0


def launched() -> tuple[int, int]:
    """Return which rank this is, and of how many, as the launcher says; 0 of 1 without one."""
    for size, rank in SIZES_AND_RANKS.items():
        found = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(value.isdecimal() for value in found):
            return int(found[0]), max(1, int(found[1]))
    return 0, 1


def wait_for_rank_0() -> None:
    """Let rank 0 be the first to say what is wrong, and end all: the others may say the same."""
    if launched()[0]:
        time.sleep(SAYS)
