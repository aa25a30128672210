"""Attention on NumPy: scores a tile at a time, changed in place, of keys that a query may see."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import accumulate_format, float_format
from llama_layers.arrays.types import Namespace
from llama_layers.layers.mask import Mask, mask_rows

# Scores of a tile: 1 MiB of float32 stay in a core's second-level cache from the product with the
# keys to the product with the values. With a causal mask half of the last QUERIES keys of a
# tile are computed in vain; fewer rows make the products slower than that.
TILE = 1 << 18
QUERIES = 64


def attend(
    xp: Namespace,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: Mask | np.ndarray | None,
    scale: float,
) -> np.ndarray:
    """Attention a block of queries and a key head at a time, if it is more than one tile in all.

    Keys before the first or after the last that the mask allows to a block are left out.
    """
    wide: np.dtype = np.dtype(accumulate_format(float_format("q", q)).name)
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    y: np.ndarray = np.zeros(q.shape, q.dtype)
    if not q.size or not keys:
        return y
    by_group = (batch, queries, kv_heads, group, width)
    out = y.reshape(by_group).transpose(0, 2, 3, 1, 4)
    grouped = q.astype(wide, copy=False).reshape(by_group).transpose(0, 2, 3, 1, 4)
    kt = k.astype(wide, copy=False).transpose(0, 2, 3, 1)
    values = v.astype(wide, copy=False).transpose(0, 2, 1, 3)
    sequences, step, together = batch, queries, kv_heads
    if queries > 1 and batch * heads * queries * keys > TILE:
        sequences, step = 1, max(1, min(QUERIES, TILE // (group * keys)))
        together = max(1, TILE // (group * step * keys))
    for start in range(0, queries, step):
        block = slice(start, min(start + step, queries))
        rows: Any = mask_rows(xp, mask, block.start, block.stop)
        for b in _parts(batch, sequences):
            seen, hidden = slice(0, keys), None
            if rows is not None:
                allowed = rows if len(rows) == 1 else rows[b]
                seen = _span(allowed)
                hidden = ~allowed[:, None, None, :, seen]
            if seen.start == seen.stop:
                continue  # zeros
            for h in _parts(kv_heads, together):
                out[b, h, :, block] = _tile(
                    grouped[b, h, :, block], kt[b, h, :, seen], values[b, h, seen], hidden, scale
                )
    return y


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _span(where: NDArray[np.bool_]) -> slice:
    """From the first to the last column that has a True, over all other axes."""
    columns = np.flatnonzero(where.any(axis=tuple(range(where.ndim - 1))))
    return slice(columns[0], columns[-1] + 1) if columns.size else slice(0, 0)


def _tile(
    q: np.ndarray,
    kt: np.ndarray,
    v: np.ndarray,
    hidden: NDArray[np.bool_] | None,
    scale: float,
) -> np.ndarray:
    """Attention of q [..., group, rows, D] to kt [..., D, T] and v [..., T, D], in that shape."""
    # The queries of a group stand one below the other against the one key head that they read.
    scores = q.reshape(*q.shape[:-3], -1, q.shape[-1]) @ kt
    scores *= scale
    if hidden is not None:
        part = _span(hidden)
        by_query = scores.reshape(*q.shape[:-1], -1)  # a view
        np.copyto(by_query[..., part], -math.inf, where=hidden[..., part])
    largest = scores.max(axis=-1, keepdims=True)
    if hidden is not None:
        largest[largest == -math.inf] = 0  # an empty row
    scores -= largest
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    total[total == 0] = 1
    y: np.ndarray = scores @ v
    y /= total
    return y.reshape(q.shape)
