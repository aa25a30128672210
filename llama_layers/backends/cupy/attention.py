"""Attention on CuPy: products by cuBLAS on the keys and values as they lie in the cache.

**Scores** are float32: cuBLAS gives float32 for 16-bit queries and keys, whose products are exact,
and scales the sums. Query heads of a group stand one below the other against the one key head that
they read, which takes a copy of the queries, and no copy of the keys.

**The second product** is of float32 probabilities, and cuBLAS multiplies numbers of one dtype only.
Rounded to bfloat16, a probability errs by 2**-9, which no bound on float32 arithmetic allows: of
keys of equal weight whose values cancel nothing but such errors would be left. Two ways do not
round:

- *bfloat16.* The 24 bits of a float32 probability are those of three bfloat16 numbers, exactly (of
  probabilities below 2**-110 some bits are lost): p = high + middle + low. So three products on
  tensor cores, added up in float32 from the smallest, are the product with p. They cost three times
  the operations of one, at some 15 times float32's rate on Hopper, and 6 bytes a probability
  instead of 4.
- *float16.* Its exponents end where small probabilities begin, so that values are widened to
  float32, a copy of T x heads x D numbers for each sequence, and multiplied in float32.

Scores exist for a block of queries at a time. Keys that no query of a block may see, later ones or
ones before its window, are left out of both products.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Namespace
from llama_layers.backends.cupy import cublas
from llama_layers.backends.cupy.compile import CONSTANTS, launch
from llama_layers.backends.libraries import CupyArray
from llama_layers.backends.trust import takes
from llama_layers.layers.mask import Mask

# Scores held at a time, over all heads of a sequence: 64 MiB in float32.
SCORES = 1 << 24

THREADS = CONSTANTS["softmax"]["THREADS"]  # of a row
NO_WINDOW = 2**31 - 1

_spans: WeakKeyDictionary[Mask, tuple[int, list[slice]]] = WeakKeyDictionary()


def _taken(q: CupyArray, k: CupyArray) -> bool:
    return bool(q.size and k.size) and dtype_name(q.dtype) != "float64" and cublas.available()


@takes(lambda xp, q, k, v, mask, scale: _taken(q, k))
def attend(
    xp: Namespace,
    q: CupyArray,
    k: CupyArray,
    v: CupyArray,
    mask: Mask | CupyArray | None,
    scale: float,
) -> CupyArray:
    """Attention one sequence after the other."""
    y = xp.empty(q.shape, dtype=q.dtype)
    for b in range(q.shape[0]):
        _sequence(xp, q[b], k[b], v[b], mask, b, scale, y[b])
    return y


def _sequence(
    xp: Namespace,
    q: CupyArray,
    k: CupyArray,
    v: CupyArray,
    mask: Mask | CupyArray | None,
    b: int,
    scale: float,
    y: CupyArray,
) -> None:
    """Attention of one sequence, q and y [S, heads, D], k and v [T, kv_heads, D]."""
    queries, heads, width = q.shape
    keys, kv_heads = k.shape[:2]
    group = heads // kv_heads
    by_head = (queries, kv_heads, group, width)
    grouped = xp.ascontiguousarray(q.reshape(by_head).transpose(1, 0, 2, 3))
    split = dtype_name(q.dtype) == "bfloat16"
    kt = cublas.readable(k.transpose(1, 2, 0))
    values = v.transpose(1, 0, 2)
    values = cublas.readable(values if split else values.astype(xp.float32, copy=False))
    step = max(1, SCORES // (heads * keys))
    for start, seen in zip(range(0, queries, step), _seen(mask, queries, keys, step), strict=True):
        stop = min(start + step, queries)
        if seen.start == seen.stop:
            y[start:stop] = 0
            continue
        rows, columns = group * (stop - start), seen.stop - seen.start
        scores = xp.empty((kv_heads, rows, columns), dtype=xp.float32)
        block = grouped[:, start:stop].reshape(kv_heads, rows, width)
        cublas.matmul(block, kt[:, :, seen], scores, alpha=scale)
        parts = xp.empty((3, *scores.shape), dtype=q.dtype) if split else None
        _softmax(scores, parts, group, _allowed(xp, mask, b, start, stop, seen))
        sums = xp.empty((kv_heads, rows, width), dtype=xp.float32)
        for i, part in enumerate([scores] if parts is None else [parts[2], parts[1], parts[0]]):
            cublas.matmul(part, values[:, seen], sums, beta=float(i > 0))
        y[start:stop].reshape(-1, kv_heads, group * width)[...] = sums.reshape(
            kv_heads, stop - start, group * width
        ).transpose(1, 0, 2)


def _seen(mask: Mask | CupyArray | None, queries: int, keys: int, step: int) -> list[slice]:
    """The keys from the first to the last that each block of queries may see."""
    starts = range(0, queries, step)
    if not isinstance(mask, Mask):
        return [slice(0, keys)] * len(starts)
    known = _spans.get(mask)
    if known is None or known[0] != step:  # the layers of a model share a mask
        of_queries, of_keys = to_numpy(mask.queries), to_numpy(mask.keys)
        spans = [_span(of_queries[i : i + step], of_keys, mask.window) for i in starts]
        _spans[mask] = known = step, spans
    return known[1]


def _span(queries: np.ndarray, keys: np.ndarray, window: int | None) -> slice:
    visible = (keys >= 0) & (keys <= queries.max())
    if window is not None:
        visible &= keys > int(queries.min()) - window
    places = np.flatnonzero(visible)
    return slice(places[0], places[-1] + 1) if places.size else slice(0, 0)


class _Allowed(NamedTuple):
    """A mask as the kernel takes it, for the queries and keys of one product."""

    kind: int = 0
    allowed: CupyArray | None = None
    queries: CupyArray | None = None
    keys: CupyArray | None = None
    keep: CupyArray | None = None
    window: int = NO_WINDOW


def _allowed(
    xp: Namespace, mask: Mask | CupyArray | None, b: int, start: int, stop: int, seen: slice
) -> _Allowed:
    if mask is None:
        return _Allowed()
    if isinstance(mask, Mask):
        slots = (mask.queries[start:stop], mask.keys[seen])
        queries, keys = (xp.ascontiguousarray(s.astype(xp.int32, copy=False)) for s in slots)
        keep = None if mask.keep is None else xp.ascontiguousarray(mask.keep[b, seen])
        window = min(mask.window or NO_WINDOW, NO_WINDOW)
        return _Allowed(2, queries=queries, keys=keys, keep=keep, window=window)
    rows = mask.reshape(-1, *mask.shape[-2:])
    return _Allowed(1, allowed=xp.ascontiguousarray(rows[min(b, len(rows) - 1), start:stop]))


def _softmax(scores: CupyArray, parts: CupyArray | None, group: int, mask: _Allowed) -> None:
    """Scores [heads, R * group, T] to probabilities, in place or in three parts."""
    heads, rows, columns = scores.shape
    numbers = (np.int32(n) for n in (columns, rows, group, mask.window))
    launch(
        "softmax",
        "softmax",
        (heads * rows,),
        (THREADS,),
        (scores, parts, mask.allowed, mask.queries, mask.keys, mask.keep, *numbers),
        MASK=mask.kind,
        SPLIT=int(parts is not None),
    )
