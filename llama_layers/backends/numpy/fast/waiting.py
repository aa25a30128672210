"""How threads of a kernel wait for each other: by counting in memory that they watch."""

from __future__ import annotations

import os

from numba import types

from llama_layers.backends.numpy.fast.jit import compiled
from llama_layers.backends.numpy.fast.vectors import arrived

_yield = types.ExternalFunction("sched_yield", types.intc()) if os.name == "posix" else None


@compiled
def until(address, count):
    """Wait until a counter has come so far."""
    spins = 0
    while arrived(address) < count:
        spins += 1
        if spins % 256 == 0 and _yield is not None:  # another thread may need this core
            _yield()
