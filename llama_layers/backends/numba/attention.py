"""Attention of many queries, by compiled tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llama_layers.arrays.types import Namespace
from llama_layers.backends.numba import kernels
from llama_layers.backends.numba.array_pool import empty
from llama_layers.backends.numba.kernel_dtypes import FLOAT32, readable, ready
from llama_layers.backends.numba.sizes import small
from llama_layers.backends.numba.threadpool import THREADS, num_threads
from llama_layers.backends.trust import takes
from llama_layers.layers.mask import Mask

# Multiply-adds that NumPy does in a millisecond: not worth loading numba for.
SMALL = 1 << 24
# Scores of a block of queries: a megabyte. With fewer queries their keys are packed too often.
SCORES = 1 << 18
MAX_BLOCK = 96  # queries


def _taken(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> bool:
    """Whether the tiles are faster."""
    as_they_lie = all(readable(a) == FLOAT32 and a.strides[3] == 4 for a in (q, k, v))
    work = q.size * k.shape[1]
    if not as_they_lie or q.shape[1] == 1 or not work or small(work, SMALL):
        return False
    return kernels.gemm.problem("float32", "float32") is None


@takes(lambda xp, q, k, v, mask, scale: _taken(q, k, v))
def attend(
    xp: Namespace,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: Mask | np.ndarray | None,
    scale: float,
) -> np.ndarray:
    """Attention of float32 numbers, a block of queries and a key head at a time."""
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    y = empty(q.shape, np.float32)
    largest = SCORES // (heads // kv_heads * keys) // 4 * 4
    problem = kernels.attention.Problem(
        places=np.array([[a.ctypes.data, *a.strides[:3]] for a in (q, k, v, y)]),
        shape=np.array([batch, queries, heads, kv_heads, width, keys]),
        scale=np.float32(scale),
        block=min(MAX_BLOCK, max(4, largest), math.ceil(queries / 4) * 4),
    )
    size = num_threads()
    scratch = kernels.attention.scratch(size, problem)
    visible = kernels.attention.Visible(*_visible(mask))
    counter = np.zeros(1, np.int64)
    THREADS.run(size, kernels.attention.attend, counter, problem, visible, scratch)
    return y


def _visible(mask: Mask | np.ndarray | None) -> tuple[Any, ...]:
    """The mask as the kernel takes it."""
    slots = np.zeros(0, np.int64)
    none, nothing = np.zeros((0, 0), np.uint8), np.zeros((0, 0, 0), np.uint8)
    if mask is None:
        return slots, slots, 0, none, nothing
    if not isinstance(mask, Mask):
        rows = ready(mask, np.bool_).reshape(-1, *mask.shape[-2:])
        return slots, slots, 0, none, rows.view(np.uint8)
    own, keys = (ready(a, np.int64) for a in (mask.queries, mask.keys))
    valid = none if mask.keep is None else ready(mask.keep, np.bool_).view(np.uint8)
    farthest = 2**63 - 1  # a longer window hides nothing
    return own, keys, min(mask.window or farthest, farthest), valid, nothing
