"""Compiled kernels of a few tokens: products with each row of a matrix, and whole layers.

A product of up to 16 tokens reads every weight once from memory and does two operations a token
with it: 4 bytes of float32, or 2 of a 16-bit format, for 2 M operations. For M <= 16 reading is the
limit: each row should be read once, in long runs, and the few operations should not delay it.

A thread's rows are read as ROWS streams, each of which runs through a part of them from end to end.
If the rows of a tile were neighbours, each stream would end with its row, which may have 1152
bytes, and the processor, which prefetches along streams, would have to detect the next ones anew.

Every sum over K is kept in LANES lanes, lane i taking the terms i, i + LANES, ..., which are added
as a tree; the terms left over come last. Neither the number of tokens, nor that of threads, nor a
row's place changes that order, so that a token's result does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import carray
from numpy.typing import NDArray

from llama_layers.backends.numba.kernel_dtypes import BFLOAT16, FLOAT16, FLOAT32
from llama_layers.backends.numba.kernels.dot_tiles import TOKENS, dot_tile, weigh
from llama_layers.backends.numba.kernels.jit import compiled, reordering_sums
from llama_layers.backends.numba.kernels.llvm import LANES, arrive, number, pointer
from llama_layers.backends.numba.kernels.pointwise import exp, gate, norm, rotate
from llama_layers.backends.numba.kernels.spin_wait import spin_until
from llama_layers.backends.numba.sizes import CHUNK, ROWS


class Inputs(NamedTuple):
    """The inputs of all layers, apart from the hidden states; M tokens in sequences of S."""

    dtype: int  # of the weights
    weights: NDArray[np.int64]  # addresses [layers, 12] in their order; 0 for a missing bias
    caches: NDArray[np.int64]  # addresses of each layer's keys and values [layers, 2]
    capacity: int
    length: int  # tokens in the cache before these
    seq: int
    eps: np.float32
    scale: np.float32
    cos: NDArray[np.float32]  # of each token [M, D / 2]
    sin: NDArray[np.float32]
    allowed: NDArray[np.uint8]  # which keys a token sees [masks, M, T]
    mask_of: NDArray[np.int64]  # the mask of each layer


class Scratch(NamedTuple):
    """Memory for what lies between the steps of a layer; the first axis of some is the thread."""

    wide: NDArray[np.float32]
    normed: NDArray[np.float32]
    qkv: NDArray[np.float32]
    parts: NDArray[np.float32]
    stats: NDArray[np.float32]
    scores: NDArray[np.float32]
    joined: NDArray[np.float32]
    added: NDArray[np.float32]
    gated: NDArray[np.float32]
    up: NDArray[np.float32]


def scratch(
    threads: int, tokens: int, hidden: int, inner: int, heads: int, kv_heads: int, width: int,
    visible: int,
) -> Scratch:  # fmt: skip
    """The memory that `layers` needs."""
    chunks = -(-visible // CHUNK)
    qkv = (heads + 2 * kv_heads) * width

    def empty(*shape: int) -> NDArray[Any]:
        return np.empty(shape, np.float32)

    return Scratch(
        wide=empty(threads, max(hidden, inner, qkv)),
        normed=empty(threads, tokens, hidden),
        qkv=empty(tokens, qkv),
        parts=empty(tokens, chunks, heads, width),
        stats=empty(tokens, chunks, heads, 2),
        scores=empty(threads, heads // kv_heads, CHUNK),
        joined=empty(threads, tokens, heads * width),
        added=empty(tokens, hidden),
        gated=empty(tokens, inner),
        up=empty(tokens, inner),
    )


@compiled
def _address(array):
    return np.intp(array.ctypes.data)


@compiled
def _meet(sync, round_, threads):
    """Wait until every thread has come here; return the number of the next round."""
    address = _address(sync)
    arrive(address)
    spin_until(address, round_ * threads, address + 8)
    return round_ + 1


@compiled
def _share(count, step, thread, threads):
    """The first row of a thread and the end of its rows: none, or at least a whole step."""
    steps = count // step
    start, stop = steps * thread // threads * step, steps * (thread + 1) // threads * step
    return start, count if thread == threads - 1 else stop


@compiled
def _rows_times(kind, rows, w, w_step, next_, x, x_step, tokens, count, y, y_row, y_token):
    """ROWS rows of weights, or one, times any number of tokens; the next ones are `next_` bytes on.

    While all of these tokens are multiplied, the weights after the next are fetched, a part with
    each TOKENS of them, so that memory is not idle while weights are used again.
    """
    slowness = 0
    while TOKENS << slowness < tokens:
        slowness += 1
    for first in range(0, tokens, TOKENS):
        left = min(TOKENS, tokens - first)
        ahead = 2 * next_ + ((first // TOKENS * next_) >> slowness)
        a, b = x + first * x_step, y + first * y_token
        if rows == 1:
            dot_tile(1, kind, left, w, w_step, a, x_step, count, b, y_row, y_token, ahead, slowness)
        else:
            dot_tile(
                ROWS, kind, left, w, w_step, a, x_step, count, b, y_row, y_token, ahead, slowness
            )


@compiled
def product(thread, threads, kind, w, x, y):
    """A thread's share of y [M, rows] = x [M, K] times the transposed [rows, K] at an address.

    There are at least ROWS rows. If their number is not a multiple of ROWS, the last tile takes the
    last rows: results that are computed twice have the same bits.
    """
    (tokens, count), rows = x.shape, y.shape[1]
    step = count * (4 if kind == FLOAT32 else 2)
    start, stop = _share(rows, ROWS, thread, threads)
    apart = (stop - start) // ROWS
    for i in range(start, start + apart):
        _rows_times(
            kind, ROWS, w + i * step, apart * step, step, _address(x), 4 * count, tokens, count,
            _address(y) + 4 * i, 4 * apart, 4 * y.shape[1],
        )  # fmt: skip
    if (stop - start) % ROWS:
        i = stop - ROWS
        _rows_times(
            kind, ROWS, w + i * step, step, step, _address(x), 4 * count, tokens, count,
            _address(y) + 4 * i, 4, 4 * y.shape[1],
        )  # fmt: skip


@reordering_sums
def _sum(x):
    total = np.float32(0)
    for value in x:
        total += value
    return total


@compiled
def _attend(q, keys, values, allowed, scale, scores, y, stats):
    """Attention of the queries [G, D], at an address, to keys and values [T, D] of their head.

    Keys before the first that is allowed, and after the last, are not looked at: they may be of
    padding, with NaN, or most of a context that is beyond a window.

    The sums of the values weighed by exp(score - m) go to the address y, [G, D]; m, the largest
    score, and the sum of the weights go to `stats` [G, 2].
    """
    first, last = 0, keys.shape[0]
    group, width = stats.shape[0], keys.shape[1]
    while first < last and not allowed[first]:
        first += 1
    while first < last and not allowed[last - 1]:
        last -= 1
    step, count = keys.strides[0], last - first
    k, v = _address(keys) + first * step, _address(values) + first * step
    p, p_step = _address(scores), 4 * scores.shape[1]
    whole = count // ROWS * ROWS
    for t in range(0, whole, ROWS):
        _rows_times(
            FLOAT32, ROWS, k + t * step, step, ROWS * step, q, 4 * width, group, width,
            p + 4 * t, 4, p_step,
        )  # fmt: skip
    for t in range(whole, count):
        _rows_times(
            FLOAT32, 1, k + t * step, step, step, q, 4 * width, group, width,
            p + 4 * t, 4, p_step,
        )  # fmt: skip
    nothing = np.float32(-np.inf)
    for g in range(group):
        largest = nothing
        for t in range(count):
            score = scores[g, t] * scale if allowed[first + t] else nothing
            scores[g, t] = score
            if score > largest:  # a NaN makes the sum NaN
                largest = score
        shift = np.float32(0) if largest == nothing else largest
        for t in range(count):
            scores[g, t] = exp(scores[g, t] - shift)
        total = _sum(scores[g, :count])
        stats[g, 0], stats[g, 1] = largest, total
    for g in range(0, group, TOKENS):
        _sum_values(
            min(TOKENS, group - g), p + g * p_step, p_step, v, step, count,
            y + 4 * g * width, 4 * width, width,
        )  # fmt: skip


@compiled
def _sum_values(tokens, p, p_step, v, v_step, count, y, y_step, width):
    """Values weighed for up to TOKENS queries, in vectors as long as the width has room for."""
    d = 0
    while d < width:
        a, b = v + 4 * d, y + 4 * d
        if d + 4 * LANES <= width:
            d += 4 * LANES
            weigh(4, LANES, tokens, p, p_step, a, v_step, count, b, y_step)
        elif d + LANES <= width:
            d += LANES
            weigh(1, LANES, tokens, p, p_step, a, v_step, count, b, y_step)
        else:
            d += 1
            weigh(1, 1, tokens, p, p_step, a, v_step, count, b, y_step)


@compiled
def _join(parts, stats, y):
    """One head's attention from that of its chunks: `parts` [chunks, D], `stats` [chunks, 2]."""
    largest = np.float32(-np.inf)
    for chunk in range(stats.shape[0]):
        if stats[chunk, 0] > largest:
            largest = stats[chunk, 0]
    shift = np.float32(0) if largest == np.float32(-np.inf) else largest
    y[:] = np.float32(0)
    total = np.float32(0)
    for chunk in range(stats.shape[0]):
        # A chunk of which nothing is allowed has zeros as its sums, and 0 for its largest score.
        own = stats[chunk, 0]
        factor = exp(own - shift) if own != np.float32(-np.inf) else np.float32(1)
        total += factor * stats[chunk, 1]
        for i in range(y.shape[0]):
            y[i] += factor * parts[chunk, i]
    for i in range(y.shape[0]):
        y[i] /= total if total != 0 else np.float32(1)


@compiled
def _widen(kind, address, start, stop, y):
    """Some of the numbers at an address, as float32."""
    for i in range(start, stop):
        if kind == FLOAT32:
            y[i] = number(FLOAT32, address + 4 * i)
        elif kind == BFLOAT16:
            y[i] = number(BFLOAT16, address + 2 * i)
        else:
            y[i] = number(FLOAT16, address + 2 * i)


@compiled
def _linear(thread, threads, kind, w, bias, x, y, wide):
    """A thread's share of a product, with the bias at an address, if that is not 0."""
    product(thread, threads, kind, w, x, y)
    if bias == 0:
        return
    start, stop = _share(y.shape[1], ROWS, thread, threads)
    _widen(kind, bias, start, stop, wide)
    for token in range(y.shape[0]):
        for i in range(start, stop):
            y[token, i] += wide[i]


@compiled
def _add(thread, threads, x, added):
    """A thread's share of the residual stream."""
    start, stop = _share(x.shape[1], ROWS, thread, threads)
    for token in range(x.shape[0]):
        for i in range(start, stop):
            x[token, i] += added[token, i]


@compiled
def _gate(thread, threads, gated, up):
    """A thread's share of the gate, in its place."""
    start, stop = _share(gated.shape[1], ROWS, thread, threads)
    for token in range(gated.shape[0]):
        own = gated[token, start:stop]
        gate(own, up[token, start:stop], own)


@compiled
def layers(thread, threads, sync, inputs, x, scratch):
    """A thread's part of all decoder layers, on the tokens x [M, H] in place.

    The threads meet six times a layer: after every product, since the next needs all of it, after
    the new keys and values are in the cache, and after attention. Each thread computes for itself
    what is cheap: norms, and the joining of chunks.
    """
    kind, seq, capacity = inputs.dtype, inputs.seq, inputs.capacity
    qkv, added, gated, up = scratch.qkv, scratch.added, scratch.gated, scratch.up
    tokens, hidden = x.shape
    width = 2 * inputs.cos.shape[1]
    chunks, heads = scratch.parts.shape[1], scratch.parts.shape[2]
    kv_heads = (qkv.shape[1] // width - heads) // 2
    group = heads // kv_heads
    batch, visible = tokens // seq, inputs.allowed.shape[2]
    own, whole, spare = scratch.normed[thread], scratch.joined[thread], scratch.wide[thread]
    round_ = 1
    for layer in range(inputs.weights.shape[0]):
        norm1, wq, q_bias, wo, o_bias, norm2, wg, gate_bias, wu, up_bias, wd, down_bias = (
            inputs.weights[layer]
        )
        keys, values = (
            carray(
                pointer(inputs.caches[layer, 0]), (batch, capacity, kv_heads, width), np.float32
            ),
            carray(
                pointer(inputs.caches[layer, 1]), (batch, capacity, kv_heads, width), np.float32
            ),
        )
        _widen(kind, norm1, 0, hidden, spare)
        norm(x, spare, inputs.eps, own)
        _linear(thread, threads, kind, wq, q_bias, own, qkv, spare)
        round_ = _meet(sync, round_, threads)
        for unit in range(thread, tokens * (heads + kv_heads), threads):
            token, head = unit // (heads + kv_heads), unit % (heads + kv_heads)
            here = qkv[token, head * width : (head + 1) * width]
            cos, sin = inputs.cos[token], inputs.sin[token]
            if head < heads:
                rotate(here, cos, sin, here)
            else:
                row, slot = token // seq, (inputs.length + token % seq) % capacity
                rotate(here, cos, sin, keys[row, slot, head - heads])
                v = (head + kv_heads) * width
                values[row, slot, head - heads, :] = qkv[token, v : v + width]
        round_ = _meet(sync, round_, threads)
        for unit in range(thread, tokens * kv_heads * chunks, threads):
            token, kv, chunk = unit // (kv_heads * chunks), unit // chunks % kv_heads, unit % chunks
            first, q_head, row = chunk * CHUNK, kv * group, token // seq
            last = min(first + CHUNK, visible)
            q = _address(qkv) + 4 * (token * qkv.shape[1] + q_head * width)
            part = 4 * ((token * chunks + chunk) * heads + q_head) * width
            _attend(
                q, keys[row, first:last, kv], values[row, first:last, kv],
                inputs.allowed[inputs.mask_of[layer], token, first:last], inputs.scale,
                scratch.scores[thread], _address(scratch.parts) + part,
                scratch.stats[token, chunk, q_head : q_head + group],
            )  # fmt: skip
        round_ = _meet(sync, round_, threads)
        for token in range(tokens):
            for head in range(heads):
                y = whole[token, head * width : (head + 1) * width]
                _join(scratch.parts[token, :, head], scratch.stats[token, :, head], y)
        _linear(thread, threads, kind, wo, o_bias, whole, added, spare)
        _add(thread, threads, x, added)
        round_ = _meet(sync, round_, threads)
        _widen(kind, norm2, 0, hidden, spare)
        norm(x, spare, inputs.eps, own)
        _linear(thread, threads, kind, wg, gate_bias, own, gated, spare)
        _linear(thread, threads, kind, wu, up_bias, own, up, spare)
        _gate(thread, threads, gated, up)
        round_ = _meet(sync, round_, threads)
        _linear(thread, threads, kind, wd, down_bias, gated, added, spare)
        _add(thread, threads, x, added)
        round_ = _meet(sync, round_, threads)
