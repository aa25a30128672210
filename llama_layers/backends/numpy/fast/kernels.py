"""Compiled kernels of a few tokens: products with each row of a matrix, and whole layers.

A product of up to 16 tokens reads every weight once from memory and does two operations a token
with it: 4 bytes of float32, or 2 of a 16-bit format, for 2 M operations. For M <= 16 reading is the
limit, so that what counts is to read each row once, in long runs, and to have the few operations
out of the way.

Every sum over K is kept in 16 lanes, lane i taking the terms i, i + 16, ..., which are added as a
tree; the terms left over come last. Neither the number of tokens, nor that of threads, nor a row's
place changes that order, so that a token's result does not depend on its neighbours.

numba does not notice if what a compiled function calls has changed in another file, so the kernels
and all that they call are in this one.
"""

from __future__ import annotations

import os
from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_layers.backends.numpy.fast.formats import BFLOAT16, CHUNK, FLOAT16, FLOAT32, ROWS

LANES = 16
TOKENS = 4  # that are multiplied at once

_I64, _I32, _I16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()


def _integer(value: int) -> Any:
    return ir.Constant(_I64, value)


def _numbers(builder: Any, address: Any, kind: int, lanes: int) -> Any:
    """Some numbers of a format, widened to float32."""
    floats = ir.VectorType(_F32, lanes)
    stored = {
        FLOAT32: floats,
        BFLOAT16: ir.VectorType(_I16, lanes),
        FLOAT16: ir.VectorType(ir.HalfType(), lanes),
    }[kind]
    loaded = builder.load(builder.inttoptr(address, stored.as_pointer()))
    loaded.align = 4 if kind == FLOAT32 else 2
    if kind == FLOAT32:
        return loaded
    if kind == FLOAT16:
        return builder.fpext(loaded, floats)
    wide = ir.VectorType(_I32, lanes)  # a bfloat16 is the upper half of a float32
    shifted = builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(shifted, floats)


def _total(builder: Any, lanes: Any, count: int) -> Any:
    """The sum of all lanes, as a tree."""
    while count > 1:
        count //= 2
        kind = ir.VectorType(_I32, count)
        halves = [
            builder.shuffle_vector(lanes, lanes, ir.Constant(kind, list(range(i, i + count))))
            for i in (0, count)
        ]
        lanes = builder.fadd(*halves)
    return builder.extract_element(lanes, ir.Constant(_I32, 0))


def _multiply_add(builder: Any, lanes: int) -> Any:
    floats = ir.VectorType(_F32, lanes)
    kind = ir.FunctionType(floats, [floats] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{lanes}f32")


def _prefetch(builder: Any, address: Any) -> None:
    """Ask for a line of memory that will be read soon, if there is such memory."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, pointer), read, keep, data])


def _zeros(builder: Any, shape: tuple[int, int], lanes: int) -> dict[Any, Any]:
    """A place for each of some sums, which LLVM keeps in a register."""
    zeros = ir.Constant(ir.VectorType(_F32, lanes), [0.0] * lanes)
    return {key: cgutils.alloca_once_value(builder, zeros) for key in np.ndindex(shape)}


def _where(builder: Any, *equal: tuple[Any, int]) -> Any:
    """A block of code for where each of some integers is a certain one."""
    tests = [builder.icmp_signed("==", value, _integer(number)) for value, number in equal]
    return builder.if_then(reduce(builder.and_, tests))


def _call(builder: Any, name: str, write: Any, arguments: Any) -> None:
    """Call a function of the module by its name, and have it written if it is not there yet.

    Written once and not inlined, a tile is compiled once, and not wherever it is used.
    """
    kind = ir.FunctionType(ir.VoidType(), [_I64] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        body = ir.IRBuilder(function.append_basic_block())
        write(body, *function.args)
        body.ret_void()
    builder.call(function, arguments)


def _write_tile(rows: int, tokens: int, form: int, builder: Any, *arguments: Any) -> None:
    """The body of a tile, with its arguments in the order of `_tile`."""
    w, w_step, x, x_step, count, y, y_row, y_token, ahead, slowness = arguments
    size = 4 if form == FLOAT32 else 2
    ws = [builder.add(w, builder.mul(w_step, _integer(r))) for r in range(rows)]
    xs = [builder.add(x, builder.mul(x_step, _integer(t))) for t in range(tokens)]
    whole = builder.and_(count, _integer(-LANES))
    totals: dict[Any, Any] = {}
    for lanes, start, stop in ((LANES, _integer(0), whole), (1, whole, count)):
        sums = _zeros(builder, (rows, tokens), lanes)
        multiply_add, step = _multiply_add(builder, lanes), _integer(lanes)
        with cgutils.for_range_slice(builder, start, stop, step, _I64) as (k, _):
            right, left = (
                [_numbers(builder, builder.add(a, offset), f, lanes) for a in addresses]
                for addresses, offset, f in (
                    (xs, builder.mul(k, _integer(4)), FLOAT32),
                    (ws, builder.mul(k, _integer(size)), form),
                )
            )
            for (r, t), place in sums.items():
                added = builder.call(multiply_add, [left[r], right[t], builder.load(place)])
                builder.store(added, place)
            if lanes == LANES:
                slower = builder.ashr(builder.mul(k, _integer(size)), slowness)
                for a in ws:
                    _prefetch(builder, builder.add(a, builder.add(ahead, slower)))
        for key, place in sums.items():
            total = _total(builder, builder.load(place), lanes)
            totals[key] = builder.fadd(totals[key], total) if key in totals else total
    for (r, t), total in totals.items():
        offset = builder.add(builder.mul(y_row, _integer(r)), builder.mul(y_token, _integer(t)))
        builder.store(total, builder.inttoptr(builder.add(y, offset), _F32.as_pointer()))


@intrinsic(prefer_literal=True)
def _tile(
    typing, rows, kind, tokens, w, w_step, x, x_step, count, y, y_row, y_token, ahead, slowness
):
    """Write the sums over K of `rows` rows of weights times 1 to TOKENS rows of x.

    Addresses and steps are in bytes. A vector of weights is read once and used `tokens` times, one
    of x `rows` times; all sums stay in registers. Meanwhile weights are fetched that are `ahead` of
    these, 2**slowness times more slowly than these are read.
    """
    count_of_rows = rows.literal_value

    def code(context, builder, signature, arguments):
        kind, tokens = arguments[1:3]
        # A single row is one of keys, which are float32 always.
        for form in (FLOAT32, BFLOAT16, FLOAT16) if count_of_rows > 1 else (FLOAT32,):
            for n in range(1, TOKENS + 1):
                name = f"llama_layers_tile_{count_of_rows}_{n}_{form}"
                with _where(builder, (kind, form), (tokens, n)):
                    write = partial(_write_tile, count_of_rows, n, form)
                    _call(builder, name, write, arguments[3:])
        return context.get_dummy_value()

    return types.void(rows, *[types.intp] * 12), code


def _write_weighed(tokens: int, vectors: int, lanes: int, builder: Any, *arguments: Any) -> None:
    """The body of a sum of values, with its arguments in the order of `_weigh`."""
    p, p_step, v, v_step, count, y, y_step = arguments
    sums = _zeros(builder, (tokens, vectors), lanes)
    multiply_add = _multiply_add(builder, lanes)
    everywhere = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    with cgutils.for_range(builder, count, intp=_I64) as loop:
        row = builder.add(v, builder.mul(v_step, loop.index))
        values = [
            _numbers(builder, builder.add(row, _integer(4 * lanes * d)), FLOAT32, lanes)
            for d in range(vectors)
        ]
        column = builder.add(p, builder.mul(_integer(4), loop.index))
        for t in range(tokens):
            address = builder.add(column, builder.mul(p_step, _integer(t)))
            one = _numbers(builder, address, FLOAT32, 1)
            weight = builder.shuffle_vector(one, one, everywhere)
            for d, value in enumerate(values):
                place = sums[t, d]
                added = builder.call(multiply_add, [weight, value, builder.load(place)])
                builder.store(added, place)
    for (t, d), place in sums.items():
        offset = builder.add(builder.mul(y_step, _integer(t)), _integer(4 * lanes * d))
        floats = ir.VectorType(_F32, lanes).as_pointer()
        target = builder.inttoptr(builder.add(y, offset), floats)
        builder.store(builder.load(place), target).align = 4


@intrinsic(prefer_literal=True)
def _weigh(typing, vectors, lanes, tokens, p, p_step, v, v_step, count, y, y_step):
    """Add up `vectors` times `lanes` numbers of each of `count` rows, weighed for each token."""
    shape = vectors.literal_value, lanes.literal_value

    def code(context, builder, signature, arguments):
        for n in range(1, TOKENS + 1):
            name = f"llama_layers_weigh_{n}_{shape[0]}_{shape[1]}"
            with _where(builder, (arguments[2], n)):
                _call(builder, name, partial(_write_weighed, n, *shape), arguments[3:])
        return context.get_dummy_value()

    return types.void(vectors, lanes, *[types.intp] * 8), code


@intrinsic(prefer_literal=True)
def _number(typing, kind, address):
    """The number of a format at an address, as a float32."""
    form = kind.literal_value

    def code(context, builder, signature, arguments):
        return builder.extract_element(
            _numbers(builder, arguments[1], form, 1), ir.Constant(_I32, 0)
        )

    return types.float32(kind, types.intp), code


@intrinsic
def _pointer(typing, address):
    """An address as what `carray` takes."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), code


@intrinsic
def _arrive(typing, address):
    """Add 1 to a counter that other threads see."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, _integer(1), "acq_rel")

    return types.int64(types.intp), code


@intrinsic
def _arrived(typing, address):
    """Read a counter that other threads add to."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.intp), code


_yield = types.ExternalFunction("sched_yield", types.intc()) if os.name == "posix" else None


_compiled = njit(nogil=True, cache=True, error_model="numpy")
_inside = njit(nogil=True, cache=True, error_model="numpy", inline="always")
_summing = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})


@_compiled
def _address(array):
    return np.intp(array.ctypes.data)


@_compiled
def _meet(sync, round_, team):
    """Wait until every thread of the team has come here; return the number of the next round."""
    address = _address(sync)
    _arrive(address)
    spins = 0
    while _arrived(address) < round_ * team:
        spins += 1
        if spins % 256 == 0 and _yield is not None:  # another thread may need this core
            _yield()
    return round_ + 1


@_compiled
def _share(count, step, thread, team):
    """From which to before which of some rows are a thread's: none, or at least a whole step."""
    steps = count // step
    start, stop = steps * thread // team * step, steps * (thread + 1) // team * step
    return start, count if thread == team - 1 else stop


@_compiled
def _rows_times(kind, rows, w, w_step, x, x_step, tokens, count, y, y_row, y_token):
    """ROWS rows of weights, or one, times any number of tokens.

    While all of these tokens are multiplied, the weights after the next are fetched, a part with
    each TOKENS of them, so that memory is not idle while weights are used again.
    """
    slowness = 0 if tokens <= TOKENS else 1 if tokens <= 2 * TOKENS else 2
    for first in range(0, tokens, TOKENS):
        left = min(TOKENS, tokens - first)
        ahead = 2 * rows * w_step + ((first // TOKENS * w_step) >> slowness)
        a, b = x + first * x_step, y + first * y_token
        if rows == 1:
            _tile(1, kind, left, w, w_step, a, x_step, count, b, y_row, y_token, ahead, slowness)
        else:
            _tile(ROWS, kind, left, w, w_step, a, x_step, count, b, y_row, y_token, ahead, slowness)


@_compiled
def product(thread, team, kind, w, rows, x, y):
    """A thread's share of y [M, rows] = x [M, K] times the transposed [rows, K] at an address.

    There are ROWS rows at least. Where their number is no multiple of it, the last tile begins
    earlier: what is computed twice comes to the same bits.
    """
    tokens, count = x.shape
    w_step = count * (4 if kind == FLOAT32 else 2)
    start, stop = _share(rows, ROWS, thread, team)
    for row in range(start, stop, ROWS):
        first = min(row, stop - ROWS)
        _rows_times(
            kind, ROWS, w + first * w_step, w_step, _address(x), 4 * count, tokens, count,
            _address(y) + 4 * first, 4, 4 * y.shape[1],
        )  # fmt: skip


@_inside
def _exp(x):
    """e**x for x <= 0, or NaN, to about one unit in the last place, in steps that vectorise.

    With n = x / ln 2 rounded and r = x - n ln 2, of at most 0.35, it is 2**n times the first terms
    of e**r; r**8 / 8! is less than a tenth of a unit. The first part of ln 2 has 9 bits, so that n
    times it is exact, and 2**n is multiplied in two parts, since it may be subnormal.
    """
    bounded = x if x > np.float32(-104) else np.float32(-104)  # half the smallest number and less
    n = np.rint(bounded * np.float32(1.4426950408889634))
    r = bounded - n * np.float32(0.693359375) + n * np.float32(2.1219444005469057e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    p = p * (r * r) + r + np.float32(1)
    whole = np.int32(n)
    half = whole >> np.int32(1)
    low = np.int32((half + np.int32(127)) << np.int32(23)).view(np.float32)
    high = np.int32((whole - half + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * low * high if x == x else x


@_summing
def _sum(x):
    total = np.float32(0)
    for value in x:
        total += value
    return total


@_summing
def _sum_of_squares(x):
    total = np.float32(0)
    for value in x:
        total += value * value
    return total


@_compiled
def _norm(x, weight, eps, y):
    """RMSNorm of each row."""
    for token in range(x.shape[0]):
        mean = _sum_of_squares(x[token]) / np.float32(x.shape[1])
        root = np.sqrt(mean + eps)
        for i in range(x.shape[1]):
            y[token, i] = weight[i] * (x[token, i] / root)


@_compiled
def _turn(x, cos, sin, y):
    """RoPE of one head, whose pairs are i and i + D/2."""
    half = cos.shape[0]
    for i in range(half):
        a, b = x[i], x[half + i]
        y[i] = a * cos[i] - b * sin[i]
        y[half + i] = b * cos[i] + a * sin[i]


@_compiled
def _attend(q, group, keys, values, head, first, last, allowed, scale, scores, y, stats):
    """The keys from first to before last for the queries [G, D], at an address, that read a head.

    At the address y, [G, D], come the sums of the values weighed by exp(score - m); in `stats`
    [G, 2] m, the largest score, and the sum of the weights.
    """
    width = keys.shape[2]
    step, count = 4 * keys.shape[1] * width, last - first
    k = _address(keys) + first * step + 4 * head * width
    v = _address(values) + first * step + 4 * head * width
    p, p_step = _address(scores), 4 * scores.shape[1]
    whole = count // ROWS * ROWS
    for t in range(0, whole, ROWS):
        _rows_times(
            FLOAT32, ROWS, k + t * step, step, q, 4 * width, group, width,
            p + 4 * t, 4, p_step,
        )  # fmt: skip
    for t in range(whole, count):
        _rows_times(
            FLOAT32, 1, k + t * step, step, q, 4 * width, group, width,
            p + 4 * t, 4, p_step,
        )  # fmt: skip
    nothing = np.float32(-np.inf)
    for g in range(group):
        largest = nothing
        for t in range(count):
            score = scores[g, t] * scale if allowed[first + t] else nothing
            scores[g, t] = score
            if score > largest:  # what is NaN makes the sum NaN
                largest = score
        shift = np.float32(0) if largest == nothing else largest
        for t in range(count):
            scores[g, t] = _exp(scores[g, t] - shift)
        total = _sum(scores[g, :count])
        stats[g, 0], stats[g, 1] = largest, total
    for g in range(0, group, TOKENS):
        _sum_values(
            min(TOKENS, group - g), p + g * p_step, p_step, v, step, count,
            y + 4 * g * width, 4 * width, width,
        )  # fmt: skip


@_compiled
def _sum_values(tokens, p, p_step, v, v_step, count, y, y_step, width):
    """Values weighed for up to TOKENS queries, in vectors as long as the width has room for."""
    d = 0
    while d < width:
        a, b = v + 4 * d, y + 4 * d
        if d + 4 * LANES <= width:
            d += 4 * LANES
            _weigh(4, LANES, tokens, p, p_step, a, v_step, count, b, y_step)
        elif d + LANES <= width:
            d += LANES
            _weigh(1, LANES, tokens, p, p_step, a, v_step, count, b, y_step)
        else:
            d += 1
            _weigh(1, 1, tokens, p, p_step, a, v_step, count, b, y_step)


@_compiled
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
        factor = _exp(own - shift) if own != np.float32(-np.inf) else np.float32(1)
        total += factor * stats[chunk, 1]
        for i in range(y.shape[0]):
            y[i] += factor * parts[chunk, i]
    for i in range(y.shape[0]):
        y[i] /= total if total != 0 else np.float32(1)


@_compiled
def _widen(kind, address, start, stop, y):
    """Some of the numbers at an address, as float32."""
    for i in range(start, stop):
        if kind == FLOAT32:
            y[i] = _number(FLOAT32, address + 4 * i)
        elif kind == BFLOAT16:
            y[i] = _number(BFLOAT16, address + 2 * i)
        else:
            y[i] = _number(FLOAT16, address + 2 * i)


@_compiled
def _linear(thread, team, kind, w, bias, rows, x, y, wide):
    """A thread's share of a product, with the bias at an address, if that is not 0."""
    product(thread, team, kind, w, rows, x, y)
    if bias == 0:
        return
    start, stop = _share(rows, ROWS, thread, team)
    _widen(kind, bias, start, stop, wide)
    for token in range(y.shape[0]):
        for i in range(start, stop):
            y[token, i] += wide[i]


@_compiled
def _add(thread, team, x, added):
    """A thread's share of the residual stream."""
    start, stop = _share(x.shape[1], ROWS, thread, team)
    for token in range(x.shape[0]):
        for i in range(start, stop):
            x[token, i] += added[token, i]


@_compiled
def _gate(thread, team, gate, up):
    """A thread's share of silu(gate) * up, in the place of the gate."""
    start, stop = _share(gate.shape[1], ROWS, thread, team)
    for token in range(gate.shape[0]):
        for i in range(start, stop):
            g = gate[token, i]
            decay = _exp(-abs(g))
            numerator = np.float32(1) if g >= 0 else decay
            gate[token, i] = g * (numerator / (np.float32(1) + decay)) * up[token, i]


@_compiled
def layers(
    thread, team, sync, kind, weights, caches, capacity, place, seq, eps, scale, cos, sin,
    allowed, mask_of, x, wide, normed, qkv, parts, stats, scores, joined, added, gate, up,
):  # fmt: skip
    """A thread's part of all decoder layers, on x [M, H] in place; see decode.py for the shapes.

    The threads meet six times a layer: after every product, since the next needs all of it, after
    the new keys and values are in the cache, and after attention. What is cheap to compute, norms
    and the joining of chunks, each thread computes for itself.
    """
    tokens, hidden = x.shape
    width = 2 * cos.shape[1]
    chunks, heads = parts.shape[1], parts.shape[2]
    kv_heads = (qkv.shape[1] // width - heads) // 2
    group = heads // kv_heads
    batch, visible = tokens // seq, allowed.shape[2]
    own, whole, spare = normed[thread], joined[thread], wide[thread]
    round_ = 1
    for layer in range(weights.shape[0]):
        norm1, wq, q_bias, wo, o_bias, norm2, wg, gate_bias, wu, up_bias, wd, down_bias = weights[
            layer
        ]
        keys = carray(_pointer(caches[layer, 0]), (batch, capacity, kv_heads, width), np.float32)
        values = carray(_pointer(caches[layer, 1]), (batch, capacity, kv_heads, width), np.float32)
        _widen(kind, norm1, 0, hidden, spare)
        _norm(x, spare, eps, own)
        _linear(thread, team, kind, wq, q_bias, qkv.shape[1], own, qkv, spare)
        round_ = _meet(sync, round_, team)
        for unit in range(thread, tokens * (heads + kv_heads), team):
            token, head = unit // (heads + kv_heads), unit % (heads + kv_heads)
            here = qkv[token, head * width : (head + 1) * width]
            if head < heads:
                _turn(here, cos[token], sin[token], here)
            else:
                row, slot = token // seq, (place + token % seq) % capacity
                _turn(here, cos[token], sin[token], keys[row, slot, head - heads])
                v = (head + kv_heads) * width
                values[row, slot, head - heads, :] = qkv[token, v : v + width]
        round_ = _meet(sync, round_, team)
        for unit in range(thread, tokens * kv_heads * chunks, team):
            token, kv, chunk = unit // (kv_heads * chunks), unit // chunks % kv_heads, unit % chunks
            first, q_head, row = chunk * CHUNK, kv * group, token // seq
            q = _address(qkv) + 4 * (token * qkv.shape[1] + q_head * width)
            part = _address(parts) + 4 * ((token * chunks + chunk) * heads + q_head) * width
            _attend(
                q, group, keys[row], values[row], kv, first, min(first + CHUNK, visible),
                allowed[mask_of[layer], token], scale, scores[thread], part,
                stats[token, chunk, q_head : q_head + group],
            )  # fmt: skip
        round_ = _meet(sync, round_, team)
        for token in range(tokens):
            for head in range(heads):
                y = whole[token, head * width : (head + 1) * width]
                _join(parts[token, :, head], stats[token, :, head], y)
        _linear(thread, team, kind, wo, o_bias, hidden, whole, added, spare)
        _add(thread, team, x, added)
        round_ = _meet(sync, round_, team)
        _widen(kind, norm2, 0, hidden, spare)
        _norm(x, spare, eps, own)
        _linear(thread, team, kind, wg, gate_bias, gate.shape[1], own, gate, spare)
        _linear(thread, team, kind, wu, up_bias, gate.shape[1], own, up, spare)
        _gate(thread, team, gate, up)
        round_ = _meet(sync, round_, team)
        _linear(thread, team, kind, wd, down_bias, hidden, gate, added, spare)
        _add(thread, team, x, added)
        round_ = _meet(sync, round_, team)
