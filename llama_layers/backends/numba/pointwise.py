"""Norm, RoPE and the gate of many tokens, by all threads; each array is read and written once."""

from __future__ import annotations

import numpy as np

from llama_layers.arrays.types import Namespace
from llama_layers.backends.numba import kernels
from llama_layers.backends.numba.array_pool import empty
from llama_layers.backends.numba.kernel_dtypes import FLOAT32, readable, ready
from llama_layers.backends.numba.sizes import small
from llama_layers.backends.numba.threadpool import THREADS, num_threads
from llama_layers.backends.trust import takes

# Numbers that NumPy computes in half a millisecond: not worth loading numba for.
SMALL = 1 << 17


def _many(x: np.ndarray) -> bool:
    """Whether kernels read it without a copy (see `ready`), and it is worth loading them."""
    usable = readable(x) == FLOAT32 and x.flags.c_contiguous and x.flags.writeable
    return bool(usable and x.size and not small(x.size, SMALL))


@takes(lambda xp, x, weight, eps: _many(x))
def normalise(xp: Namespace, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x * x) + eps) * weight`` over the last axis."""
    y = empty(x.shape, np.float32)
    rows, results = (ready(array, np.float32).reshape(-1, x.shape[-1]) for array in (x, y))
    weight = ready(weight, np.float32)
    THREADS.run(num_threads(), kernels.pointwise.norm_part, rows, weight, np.float32(eps), results)
    return y


def _rotated(xp: Namespace, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str) -> bool:
    """Whether the kernel takes x and the angles."""
    as_it_lies = readable(x) == FLOAT32 and x.strides[3] == 4
    many = x.size > 0 and not small(x.size, SMALL)
    # The kernel takes the rows of both tables from the same places.
    return layout == "half" and as_it_lies and many and cos.shape == sin.shape


@takes(_rotated)
def rotate(
    xp: Namespace, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str
) -> np.ndarray:
    """RoPE of pairs i and i + D/2."""
    y = empty(x.shape, np.float32)
    angles = [ready(a, np.float32).reshape(-1, *a.shape[-2:]) for a in (cos, sin)]
    steps = np.array(x.strides[:3])
    THREADS.run(num_threads(), kernels.pointwise.rotate_part, x.ctypes.data, steps, *angles, y)
    return y


@takes(lambda xp, gate, up: _many(gate) and _many(up))
def gate_with_silu(xp: Namespace, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """``gate / (1 + exp(-gate)) * up``."""
    y = empty(gate.shape, np.float32)
    numbers = (ready(array, np.float32).reshape(-1) for array in (gate, up, y))
    THREADS.run(num_threads(), kernels.pointwise.gate_part, *numbers)
    return y
