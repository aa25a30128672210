"""Norm, RoPE and the gate of many tokens, by all threads; each array is read and written once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dispatch import takes
from llama_layers.backends.numba.formats import FLOAT32, readable, ready
from llama_layers.backends.numba.team import TEAM, threads
from llama_layers.backends.numpy.memory import empty
from llama_layers.backends.numpy.sizes import small

# Numbers that NumPy is done with in half a millisecond: not worth loading numba for.
SMALL = 1 << 17


def _many(x: NDArray[Any]) -> bool:
    """Whether kernels read it without a copy, and it is worth it; see `formats.ready`."""
    usable = readable(x) == FLOAT32 and x.flags.c_contiguous and x.flags.writeable
    return bool(usable and x.size and not small(x.size, SMALL))


@takes(lambda xp, x, weight, eps: _many(x))
def normalise(xp: Any, x: NDArray[Any], weight: NDArray[Any], eps: float) -> NDArray[Any]:
    """``x / sqrt(mean(x * x) + eps) * weight`` over the last axis."""
    from llama_layers.backends.numba import elements  # loads numba, which takes a while

    y = empty(x.shape, np.float32)
    rows, results = (ready(array, np.float32).reshape(-1, x.shape[-1]) for array in (x, y))
    TEAM.run(
        threads(), elements.norm_part, rows, ready(weight, np.float32), np.float32(eps), results
    )
    return y


def _turned(xp: Any, x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], layout: str) -> bool:
    """Whether the kernel turns it."""
    as_it_lies = readable(x) == FLOAT32 and x.strides[3] == 4
    many = x.size > 0 and not small(x.size, SMALL)
    # The kernel takes the rows of both tables from the same places.
    return layout == "half" and as_it_lies and many and cos.shape == sin.shape


@takes(_turned)
def rotate(
    xp: Any, x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], layout: str
) -> NDArray[Any]:
    """RoPE of pairs i and i + D/2."""
    from llama_layers.backends.numba import elements

    y = empty(x.shape, np.float32)
    angles = [ready(a, np.float32).reshape(-1, *a.shape[-2:]) for a in (cos, sin)]
    steps = np.array(x.strides[:3])
    TEAM.run(threads(), elements.turn_part, x.ctypes.data, steps, *angles, y)
    return y


@takes(lambda xp, gate, up: _many(gate) and _many(up))
def gate_with_silu(xp: Any, gate: NDArray[Any], up: NDArray[Any]) -> NDArray[Any]:
    """``gate / (1 + exp(-gate)) * up``."""
    from llama_layers.backends.numba import elements

    y = empty(gate.shape, np.float32)
    numbers = (ready(array, np.float32).reshape(-1) for array in (gate, up, y))
    TEAM.run(threads(), elements.gate_part, *numbers)
    return y
