"""Attention of many queries, by compiled tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dispatch import takes
from llama_layers.backends.numba.formats import FLOAT32, readable, ready
from llama_layers.backends.numba.team import TEAM, threads
from llama_layers.backends.numpy.memory import empty
from llama_layers.backends.numpy.sizes import small
from llama_layers.layers.mask import Mask

# Multiply-adds that NumPy does in a millisecond: not worth loading numba for.
SMALL = 1 << 24
# Scores of a block of queries: a megabyte. With fewer queries their keys are packed too often.
SCORES = 1 << 18
MOST = 96  # queries of a block


def _taken(
    xp: Any, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Any | None, scale: float
) -> bool:
    """Whether the tiles are faster."""
    as_they_lie = all(readable(a) == FLOAT32 and a.strides[3] == 4 for a in (q, k, v))
    work = q.size * k.shape[1]
    if not as_they_lie or q.shape[1] == 1 or not work or small(work, SMALL):
        return False
    from llama_layers.backends.numba import gemm  # loads numba, which takes a while

    return gemm.problem("float32", "float32") is None


@takes(_taken)
def attend(
    xp: Any, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: Any | None, scale: float
) -> NDArray[Any]:
    """Attention of float32 numbers, a block of queries and a key head at a time."""
    from llama_layers.backends.numba import tiled_attention

    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    y = empty(q.shape, np.float32)
    group = heads // kv_heads
    block = min(MOST, max(4, SCORES // (group * keys) // 4 * 4), math.ceil(queries / 4) * 4)
    size = threads()
    shape = np.array([batch, queries, heads, kv_heads, width, keys])
    places = np.array([[a.ctypes.data, *a.strides[:3]] for a in (q, k, v, y)])
    memory = tiled_attention.memory(size, block * group, block, keys, width)
    TEAM.run(
        size, tiled_attention.attend, np.zeros(1, np.int64), places, shape, np.float32(scale),
        *_visibility(mask), block, *memory,
    )  # fmt: skip
    return y


def _visibility(mask: Any | None) -> tuple[Any, ...]:
    """The mask as the kernel takes it: slots, or a row for each query, or neither."""
    slots = np.zeros(0, np.int64)
    none, nothing = np.zeros((0, 0), np.uint8), np.zeros((0, 0, 0), np.uint8)
    if mask is None:
        return slots, slots, 0, none, nothing
    if not isinstance(mask, Mask):
        rows = ready(mask, np.bool_).reshape(-1, *mask.shape[-2:])
        return slots, slots, 0, none, rows.view(np.uint8)
    own, keys = (ready(a, np.int64) for a in (mask.queries, mask.keys))
    keep = none if mask.keep is None else ready(mask.keep, np.bool_).view(np.uint8)
    farthest = 2**63 - 1  # a longer window hides nothing
    return own, keys, min(mask.window or farthest, farthest), keep, nothing
