"""Attention of many queries, compiled: both products by the tiles of gemm.py.

A unit of work is a key head and a block of queries of a sequence, with all heads that read it; the
threads take units in turn, the longest first. The queries of a unit are packed as tokens are for a
product, and its keys in panels of COLUMNS. The scores of a block are kept, a megabyte at most,
from the first product to the second, for which their exponentials are packed as tokens and the
values are the panels. A panel of keys that the mask hides from the whole block is not looked at:
half of them, if it is causal.

All 2 x 2 operations for a query, key and channel are in tiles. Besides, each score is scaled and
compared, its exponential is taken in vectors, and it is packed once more, which together takes the
time of some ten channels.

Keys of a panel that only other queries of the block may see have the weight 0, which changes no
sum, and panels are summed in fixed parts of PANELS: so a query's result depends neither on the
others nor on the threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import carray
from numpy.typing import NDArray

from llama_layers.backends.numba.array_pool import empty
from llama_layers.backends.numba.kernel_dtypes import FLOAT32
from llama_layers.backends.numba.kernels.jit import compiled
from llama_layers.backends.numba.kernels.llvm import LANES, arrive, pointer
from llama_layers.backends.numba.kernels.outer_tiles import COLUMNS, GROUP, interleave
from llama_layers.backends.numba.kernels.panels import LINE, pack_panel, panel_times
from llama_layers.backends.numba.kernels.pointwise import exp

PANELS = 16  # of keys, whose exponentials and values are packed at a time


class Problem(NamedTuple):
    """The inputs and the output of attention, apart from the mask."""

    # The address of q, k, v and y, and the bytes to the next sequence, token and head [4, 4].
    places: NDArray[np.int64]
    shape: NDArray[np.int64]  # sequences, queries, heads, key heads, channels of a head, keys
    scale: np.float32
    block: int  # queries of a block, a multiple of GROUP


class Visible(NamedTuple):
    """Which keys a query sees: by slots, or by a row for each query; all if everything is empty."""

    queries: NDArray[np.int64]
    keys: NDArray[np.int64]
    window: int
    valid: NDArray[np.uint8]  # which keys of a sequence are not padding [1 or B, T], or empty
    allowed: NDArray[np.uint8]  # [1 or B, S, T], or empty


class Scratch(NamedTuple):
    """Memory that threads compute in: one item for each thread, or the item of one thread."""

    packed: NDArray[np.float32]  # queries, as tiles read them
    panel: NDArray[np.float32]
    scores: NDArray[np.float32]  # of a row, which is a query of a head, in panels of keys
    weights: NDArray[np.float32]  # exponentials, as tiles read them
    sums: NDArray[np.float32]  # values weighed by them
    totals: NDArray[np.float32]  # of the exponentials of a row
    largest: NDArray[np.float32]  # score of each row and lane
    lanes: NDArray[np.float32]  # the sum of the exponentials of each row and lane
    seen: NDArray[np.uint8]  # which keys of a panel a query sees
    used: NDArray[np.uint8]  # which panels any query of the block sees
    zeros: NDArray[np.float32]  # from which sums begin


def scratch(threads: int, problem: Problem) -> Scratch:
    """Memory for some threads."""
    _, _, heads, kv_heads, width, keys = map(int, problem.shape)
    rows = problem.block * (heads // kv_heads)
    panels, channels = -(-keys // COLUMNS), -(-width // COLUMNS)
    groups, padded = rows // GROUP, -(-width // LANES) * LANES

    def floats(*shape: int) -> NDArray[np.float32]:
        return empty((threads, *shape), np.float32)

    return Scratch(
        packed=floats(groups, GROUP * padded),
        panel=floats(COLUMNS * max(padded, PANELS * COLUMNS) + LINE),
        scores=floats(panels, rows, COLUMNS),
        weights=floats(groups, GROUP * PANELS * COLUMNS + LINE),
        sums=floats(channels, rows, COLUMNS),
        totals=floats(rows),
        largest=floats(rows, COLUMNS),
        lanes=floats(rows, COLUMNS),
        seen=np.zeros((threads, panels, problem.block, COLUMNS), np.uint8),
        used=np.empty((threads, panels), np.uint8),
        zeros=np.zeros((threads, COLUMNS), np.float32),
    )


@compiled
def attend(thread, threads, counter, problem, visible, scratch):
    """A thread's part of attention. `counter` is a zero that the threads share."""
    own = Scratch(
        scratch.packed[thread], scratch.panel[thread], scratch.scores[thread],
        scratch.weights[thread], scratch.sums[thread], scratch.totals[thread],
        scratch.largest[thread], scratch.lanes[thread], scratch.seen[thread], scratch.used[thread],
        scratch.zeros[thread],
    )  # fmt: skip
    places, block = problem.places, problem.block
    batch, count, heads, kv_heads, _, _ = problem.shape
    group = heads // kv_heads
    masked = visible.queries.size > 0 or visible.allowed.size > 0
    each = batch * kv_heads
    blocks = -(-count // block)
    unit = arrive(counter.ctypes.data)
    while unit < each * blocks:
        first = (blocks - 1 - unit // each) * block
        sequence, kv_head = unit % each // kv_heads, unit % kv_heads
        some = min(block, count - first)
        padded = -(-some // GROUP) * GROUP
        q = _begin(places[0], sequence, first, kv_head * group)
        y = _begin(places[3], sequence, first, kv_head * group)
        k, v = _begin(places[1], sequence, 0, kv_head), _begin(places[2], sequence, 0, kv_head)
        _see(problem, visible, own, sequence, first, some)
        _score(problem, own, q, k, some, padded)
        _exponentials(own, group * padded, padded, problem.scale, masked)
        _weigh(problem, own, v, group * padded)
        _divide(problem, own, y, some, padded)
        unit = arrive(counter.ctypes.data)


@compiled
def _begin(place, sequence, token, head):
    return place[0] + sequence * place[1] + token * place[2] + head * place[3]


@compiled
def _aligned(panel):
    return (panel.ctypes.data + 63) // 64 * 64


@compiled
def _see(problem, visible, own, batch, first, count):
    """Which keys each of `count` queries of a block sees, and which panels any of them does."""
    allowed, valid, seen, used = visible.allowed, visible.valid, own.seen, own.used
    keys = problem.shape[5]
    for p in range(used.shape[0]):
        begin = p * COLUMNS
        columns = min(COLUMNS, keys - begin)
        found = np.uint8(0)
        for i in range(count):
            row = seen[p, i]
            row[columns:] = 0
            if allowed.size:
                row[:columns] = allowed[
                    batch % allowed.shape[0], first + i, begin : begin + columns
                ]
            elif visible.queries.size:
                own = visible.queries[first + i]
                for j in range(columns):
                    slot = visible.keys[begin + j]
                    row[j] = (slot >= 0) & (slot <= own) & (slot > own - visible.window)
                if valid.size:
                    for j in range(columns):
                        row[j] &= valid[batch % valid.shape[0], begin + j]
            else:
                row[:columns] = 1
            for j in range(columns):
                found |= row[j]
        used[p] = found


@compiled
def _scale_and_hide(scores, see, scale, largest):
    """Scores of a panel and some rows, and the largest of each row and lane so far."""
    for i in range(scores.shape[0]):
        score = scores[i] * scale if see[i] else np.float32(-np.inf)
        scores[i] = score
        largest[i] = score if score > largest[i] else largest[i]  # not if it is NaN


@compiled
def _exponentiate(scores, shifts, sums):
    """Exponentials of a panel and some rows, and their sum in each row and lane so far."""
    for i in range(scores.shape[0]):
        weight = exp(scores[i] - shifts[i])
        scores[i] = weight
        sums[i] += weight


@compiled
def _exponentials(own, rows, padded, scale, masked):
    """Scores to their exponentials above the largest of their row, and the sum of each row.

    The numbers of a panel lie side by side, and so do those of each row and lane, so that
    loops are long and LLVM makes vectors of them.
    """
    scores, used, largest, sums = own.scores, own.used, own.largest, own.lanes
    nothing = np.float32(-np.inf)
    largest[:rows], sums[:rows] = nothing, np.float32(0)
    for p in range(used.shape[0]):
        if used[p]:
            see = own.seen[p, :padded].reshape(-1)
            for head in range(0, rows, padded):
                here, most = scores[p, head : head + padded], largest[head : head + padded]
                _scale_and_hide(here.reshape(-1), see, scale, most.reshape(-1))
    for row in range(rows):
        shift = nothing
        for j in range(COLUMNS):
            shift = max(shift, largest[row, j])
        largest[row, :] = np.float32(0) if masked and shift == nothing else shift
    for p in range(used.shape[0]):
        if used[p]:
            here, shifts = scores[p, :rows].reshape(-1), largest[:rows].reshape(-1)
            _exponentiate(here, shifts, sums[:rows].reshape(-1))
    for row in range(rows):
        total = np.float32(0)
        for j in range(COLUMNS):
            total += sums[row, j]
        own.totals[row] = total


@compiled
def _pack_values(v, step, width, keys, start, stop, used, panel):
    """Up to COLUMNS channels of the values of the used panels, one key below the other."""
    n = 0
    for p in range(start, stop):
        if used[p]:
            for t in range(p * COLUMNS, (p + 1) * COLUMNS):
                to = carray(pointer(panel + 4 * COLUMNS * n), (COLUMNS,), np.float32)
                n += 1
                if t >= keys:
                    to[:] = np.float32(0)
                    continue
                row = carray(pointer(v + t * step), (COLUMNS,), np.float32)
                if width >= COLUMNS:
                    for j in range(COLUMNS):
                        to[j] = row[j]
                else:
                    for j in range(width):
                        to[j] = row[j]
                    to[width:] = np.float32(0)


@compiled
def _score(problem, own, q, k, some, padded):
    """Products of a block's queries, head after head, with the used panels of keys."""
    _, _, heads, kv_heads, width, keys = problem.shape
    group, panel, packed = heads // kv_heads, _aligned(own.panel), own.packed
    token, apart = problem.places[0, 2], 4 * packed.shape[1]
    for g in range(group):
        for i in range(0, padded, GROUP):
            x = q + i * token + g * problem.places[0, 3]
            to = packed.ctypes.data + apart * ((g * padded + i) // GROUP)
            for c in range(0, width, LANES):
                left = min(LANES, width - c)
                interleave(x + 4 * c, token, some - 1 - i, left, to + 4 * GROUP * c)
    step = problem.places[1, 2]
    for p in range(own.used.shape[0]):
        if own.used[p]:
            here, soon = k + p * COLUMNS * step, k + (p + 1) * COLUMNS * step
            pack_panel(FLOAT32, here, step, min(COLUMNS, keys - p * COLUMNS), width, panel)
            panel_times(
                packed, packed.ctypes.data, apart, group * padded // GROUP, panel, width,
                own.zeros.ctypes.data, 0, own.scores[p].ctypes.data, soon, step, 4 * width,
            )  # fmt: skip


@compiled
def _weigh(problem, own, v, rows):
    """Products of a block's exponentials with the values of the used panels."""
    groups, panel, weights, sums = rows // GROUP, _aligned(own.panel), own.weights, own.sums
    apart, row = 4 * weights.shape[1], 4 * COLUMNS
    step = problem.places[2, 2]
    _, _, _, _, width, keys = problem.shape
    begun = False
    for start in range(0, own.used.shape[0], PANELS):
        stop = min(start + PANELS, own.used.shape[0])
        n = 0
        for p in range(start, stop):
            if own.used[p]:
                for g in range(groups):
                    x = own.scores[p].ctypes.data + row * GROUP * g
                    to = weights.ctypes.data + apart * g + 4 * GROUP * n
                    for j in range(0, COLUMNS, LANES):
                        interleave(x + 4 * j, row, GROUP - 1, LANES, to + 4 * GROUP * j)
                n += COLUMNS
        if n == 0:
            continue
        for c in range(sums.shape[0]):
            here = v + 4 * COLUMNS * c
            _pack_values(here, step, width - COLUMNS * c, keys, start, stop, own.used, panel)
            begin, from_row = (sums[c].ctypes.data, row) if begun else (own.zeros.ctypes.data, 0)
            panel_times(
                weights, weights.ctypes.data, apart, groups, panel, n, begin, from_row,
                sums[c].ctypes.data, here, step, 0,
            )  # fmt: skip
        begun = True
    if not begun:
        sums[:] = np.float32(0)


@compiled
def _divide(problem, own, y, some, padded):
    """The weighed values over the sum of their weights, to y."""
    _, _, heads, kv_heads, width, _ = problem.shape
    group = heads // kv_heads
    for i in range(some):
        for g in range(group):
            row = g * padded + i
            total = own.totals[row] if own.totals[row] != 0 else np.float32(1)
            at = y + i * problem.places[3, 2] + g * problem.places[3, 3]
            out = carray(pointer(at), (width,), np.float32)
            for d in range(width):
                out[d] = own.sums[d // COLUMNS, row, d % COLUMNS] / total
