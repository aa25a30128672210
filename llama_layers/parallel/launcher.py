"""Whether a launcher of MPI started this process."""

from __future__ import annotations

import os

# Set by MPICH and its relatives, by Open MPI, and by Intel MPI.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


def launched_ranks() -> int:
    """Return how many ranks a launcher of MPI says that it started; 1 without one."""
    for name in SIZES:
        if (value := os.environ.get(name, "")).isdecimal():
            return max(1, int(value))
    return 1
