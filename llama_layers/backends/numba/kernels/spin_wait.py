"""How threads of a kernel wait for each other: by counting in memory that they watch."""

from __future__ import annotations

import os

import numpy as np
from numba import types

from llama_layers.backends.numba.kernels.jit import compiled
from llama_layers.backends.numba.kernels.llvm import arrived

_POSIX = os.name == "posix"
_yield = types.ExternalFunction("sched_yield", types.intc()) if _POSIX else None
_sleep = types.ExternalFunction("usleep", types.intc(types.uint32)) if _POSIX else None
# Longer than threads wait for each other while each has a core: that takes some tenths of a
# millisecond. A thread without a core keeps others waiting for several milliseconds, and for fewer
# if they go to sleep: the system then moves it to their core.
_PATIENCE = 1 << 17  # looks at the counter
_NAP = 50  # microseconds


@compiled
def spin_until(address, count, stop):
    """Wait until a counter has reached `count`, or the number at `stop` is not 0."""
    spins = 0
    while arrived(address) < count:
        spins += 1
        if spins % 256 == 0:
            if arrived(stop) != 0:
                return
            if _yield is not None:  # another thread may need this core
                if spins < _PATIENCE:
                    _yield()
                else:
                    _sleep(np.uint32(_NAP))
