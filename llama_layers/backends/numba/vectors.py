"""The vectors and atomic counters of the kernels, written in LLVM.

What numba compiles from loops depends on how LLVM sees them; these tiles are what they are: which
sums are in registers, in which order they are added, and what is read once.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_layers.backends.numba.formats import BFLOAT16, FLOAT16, FLOAT32
from llama_layers.backends.numba.processor import missing

# AVX-512 has 32 registers of 16 lanes: room for the sums of a tile of 4 rows by 4 tokens and for
# what is multiplied. AVX2 has 16 of 8 lanes.
WIDE = missing("avx512f") is None
LANES = 16 if WIDE else 8
TOKENS = 4 if WIDE else 3  # that are multiplied at once

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
    """The body of a tile, with its arguments in the order of `tile`."""
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
def tile(
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
    """The body of a sum of values, with its arguments in the order of `weigh`."""
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
def weigh(typing, vectors, lanes, tokens, p, p_step, v, v_step, count, y, y_step):
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
def number(typing, kind, address):
    """The number of a format at an address, as a float32."""
    form = kind.literal_value

    def code(context, builder, signature, arguments):
        return builder.extract_element(
            _numbers(builder, arguments[1], form, 1), ir.Constant(_I32, 0)
        )

    return types.float32(kind, types.intp), code


@intrinsic
def pointer(typing, address):
    """An address as what `carray` takes."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), code


@intrinsic
def arrive(typing, address):
    """Add 1 to a counter that other threads see."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, _integer(1), "acq_rel")

    return types.int64(types.intp), code


@intrinsic
def arrived(typing, address):
    """Read a counter that other threads add to."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.intp), code
