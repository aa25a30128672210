"""Products of a few rows with a few rows, whose sums stay in registers; written in LLVM.

How loops are compiled depends on what LLVM makes of them. These tiles fix which sums are in
registers, in which order they are added, and which numbers are read once.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_layers.backends.numba.kernel_dtypes import BFLOAT16, FLOAT16, FLOAT32
from llama_layers.backends.numba.kernels.llvm import (
    F32,
    I32,
    I64,
    LANES,
    WIDE,
    floats_at,
    integer,
    prefetch,
)

# Tokens that are multiplied at once: with AVX-512 there is room for the sums of 4 rows by 4 tokens
# and for what is multiplied, with AVX2 for those of 4 by 3.
TOKENS = 4 if WIDE else 3


def _total(builder: Any, lanes: Any, count: int) -> Any:
    """The sum of all lanes, as a tree."""
    while count > 1:
        count //= 2
        kind = ir.VectorType(I32, count)
        halves = [
            builder.shuffle_vector(lanes, lanes, ir.Constant(kind, list(range(i, i + count))))
            for i in (0, count)
        ]
        lanes = builder.fadd(*halves)
    return builder.extract_element(lanes, ir.Constant(I32, 0))


def _multiply_add(builder: Any, lanes: int) -> Any:
    floats = ir.VectorType(F32, lanes)
    kind = ir.FunctionType(floats, [floats] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{lanes}f32")


def _zeros(builder: Any, shape: tuple[int, int], lanes: int) -> dict[Any, Any]:
    """A place for each sum, which LLVM keeps in a register."""
    zeros = ir.Constant(ir.VectorType(F32, lanes), [0.0] * lanes)
    return {key: cgutils.alloca_once_value(builder, zeros) for key in np.ndindex(shape)}


def _where(builder: Any, *equal: tuple[Any, int]) -> Any:
    """A block of code for where integers have certain values."""
    tests = [builder.icmp_signed("==", value, integer(number)) for value, number in equal]
    return builder.if_then(reduce(builder.and_, tests))


def _call(builder: Any, name: str, write: Any, arguments: Any) -> None:
    """Call a function of the module by its name, after writing it if it is not there yet.

    Since it is written once and not inlined, a tile is compiled once, and not wherever it is used.
    """
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        body = ir.IRBuilder(function.append_basic_block())
        write(body, *function.args)
        body.ret_void()
    builder.call(function, arguments)


def _write_tile(rows: int, tokens: int, form: int, builder: Any, *arguments: Any) -> None:
    """The body of a tile, with its arguments in the order of `dot_tile`."""
    w, w_step, x, x_step, count, y, y_row, y_token, ahead, slowness = arguments
    size = 4 if form == FLOAT32 else 2
    ws = [builder.add(w, builder.mul(w_step, integer(r))) for r in range(rows)]
    xs = [builder.add(x, builder.mul(x_step, integer(t))) for t in range(tokens)]
    whole = builder.and_(count, integer(-LANES))
    totals: dict[Any, Any] = {}
    for lanes, start, stop in ((LANES, integer(0), whole), (1, whole, count)):
        sums = _zeros(builder, (rows, tokens), lanes)
        multiply_add, step = _multiply_add(builder, lanes), integer(lanes)
        with cgutils.for_range_slice(builder, start, stop, step, I64) as (k, _):
            right, left = (
                [floats_at(builder, builder.add(a, offset), f, lanes) for a in addresses]
                for addresses, offset, f in (
                    (xs, builder.mul(k, integer(4)), FLOAT32),
                    (ws, builder.mul(k, integer(size)), form),
                )
            )
            for (r, t), place in sums.items():
                added = builder.call(multiply_add, [left[r], right[t], builder.load(place)])
                builder.store(added, place)
            if lanes == LANES:
                slower = builder.ashr(builder.mul(k, integer(size)), slowness)
                for a in ws:
                    prefetch(builder, builder.add(a, builder.add(ahead, slower)), locality=2)
        for key, place in sums.items():
            total = _total(builder, builder.load(place), lanes)
            totals[key] = builder.fadd(totals[key], total) if key in totals else total
    for (r, t), total in totals.items():
        offset = builder.add(builder.mul(y_row, integer(r)), builder.mul(y_token, integer(t)))
        builder.store(total, builder.inttoptr(builder.add(y, offset), F32.as_pointer()))


@intrinsic(prefer_literal=True)
def dot_tile(
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
    everywhere = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    with cgutils.for_range(builder, count, intp=I64) as loop:
        row = builder.add(v, builder.mul(v_step, loop.index))
        values = [
            floats_at(builder, builder.add(row, integer(4 * lanes * d)), FLOAT32, lanes)
            for d in range(vectors)
        ]
        column = builder.add(p, builder.mul(integer(4), loop.index))
        for t in range(tokens):
            address = builder.add(column, builder.mul(p_step, integer(t)))
            one = floats_at(builder, address, FLOAT32, 1)
            weight = builder.shuffle_vector(one, one, everywhere)
            for d, value in enumerate(values):
                place = sums[t, d]
                added = builder.call(multiply_add, [weight, value, builder.load(place)])
                builder.store(added, place)
    for (t, d), place in sums.items():
        offset = builder.add(builder.mul(y_step, integer(t)), integer(4 * lanes * d))
        floats = ir.VectorType(F32, lanes).as_pointer()
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
