"""Products of a panel with many tokens, and its packing, written in LLVM; see gemm.py.

A unit is what fills a lane of 32 bits: one float32, or a pair of bfloat16 numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_layers.backends.numba.kernel_dtypes import BFLOAT16, FLOAT16, FLOAT32
from llama_layers.backends.numba.kernels.llvm import (
    I16,
    I32,
    I64,
    LANES,
    WIDE,
    from_bfloat16,
    integer,
    load,
    pick,
    prefetch,
    store,
)

# A tile's sums take 24 vectors with AVX-512 and 12 with AVX2; two take what it multiplies by, and
# one or more a token.
HALF = LANES // 2
VECTORS = 2  # of columns in a tile
COLUMNS = VECTORS * LANES  # of y, rows of w, in a panel
GROUP = 4 if WIDE else 2  # tokens that are packed together
GROUPS = 3  # in a tile, or fewer in the last
ROWS = GROUPS * GROUP  # tokens in a tile
STEP = 1 if WIDE else 4  # units after which a line is fetched: that takes ten instructions

_UNITS, _FLOATS = ir.VectorType(I32, LANES), ir.VectorType(ir.FloatType(), LANES)


def _fetch(builder: Any, place: Any, ahead: Any, step: Any, lines: Any) -> None:
    """Fetch a line of memory, which need not exist.

    `place` says which of the rows at `ahead`, `step` apart, in parts of 2**16: each row has its
    `lines` in such order.
    """
    part = builder.and_(place, integer(0xFFFF))
    line = builder.lshr(builder.mul(part, lines), integer(16))
    row = builder.mul(builder.lshr(place, integer(16)), step)
    address = builder.add(builder.add(ahead, row), builder.shl(line, integer(6)))
    prefetch(builder, address, locality=3)


@intrinsic(prefer_literal=True)
def outer_tile(
    typing, groups, packed, x, apart, panel, depth, begin, step, sums, ahead, row, lines
):
    """Write rows of sums: those at `begin`, plus `depth` units of `groups` groups by a panel.

    The type of `packed` says what a unit is; x, panel, begin and sums are addresses. `apart` is
    from a group of x to the next, `step` from a row at `begin` to the next. Meanwhile `lines` lines
    are fetched of each of the COLUMNS rows of w at `ahead`, which are `row` apart.
    """
    rows = GROUP * groups.literal_value
    pairs = packed.dtype == types.uint32
    operand, name = (
        (_UNITS, "x86.avx512bf16.dpbf16ps.512") if pairs else (_FLOATS, f"fma.v{LANES}f32")
    )

    def code(context, builder, signature, arguments):
        x, apart, panel, depth, begin, step, sums, *fetched = arguments[2:]
        # sum, x, w for pairs; x, w, sum for floats
        order = [_FLOATS, operand, operand]
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, order), f"llvm.{name}"
        )
        zeros = ir.Constant(_FLOATS, [0.0] * LANES)
        totals = {
            (r, v): cgutils.alloca_once_value(builder, zeros)
            for r in range(rows)
            for v in range(VECTORS)
        }

        def add_unit(k):
            a = builder.add(x, builder.mul(k, integer(4 * GROUP)))
            b = builder.add(panel, builder.mul(k, integer(4 * COLUMNS)))
            columns = [
                load(builder, builder.add(b, integer(4 * LANES * v)), operand)
                for v in range(VECTORS)
            ]
            for r in range(rows):
                group = builder.add(a, builder.mul(apart, integer(r // GROUP)))
                address = builder.add(group, integer(4 * (r % GROUP)))
                one = load(builder, address, ir.VectorType(operand.element, 1))
                token = pick(builder, one, one, [0] * LANES)
                for v in range(VECTORS):
                    total = builder.load(totals[r, v])
                    terms = (total, token, columns[v]) if pairs else (token, columns[v], total)
                    builder.store(builder.call(multiply_add, terms), totals[r, v])

        steps = builder.udiv(depth, integer(STEP))
        # of a row to be fetched with a step, in parts of 2**16; there may be none
        rate = builder.udiv(integer(COLUMNS << 16), builder.add(steps, integer(1)))
        with cgutils.for_range(builder, steps, intp=I64) as loop:
            _fetch(builder, builder.mul(loop.index, rate), *fetched)
            for more in range(STEP):
                add_unit(builder.add(builder.mul(loop.index, integer(STEP)), integer(more)))
        if STEP > 1:
            begun = builder.mul(steps, integer(STEP))
            with cgutils.for_range_slice(builder, begun, depth, integer(1), I64) as (k, _):
                add_unit(k)
        for (r, v), total in totals.items():
            place = builder.add(begin, builder.mul(step, integer(r)))
            before = load(builder, builder.add(place, integer(4 * LANES * v)), _FLOATS)
            address = builder.add(sums, integer(4 * (COLUMNS * r + LANES * v)))
            store(builder, builder.fadd(before, builder.load(total)), address)
        return context.get_dummy_value()

    return types.void(groups, packed, *[types.intp] * 10), code


def _read(
    builder: Any, address: Any, step: Any, rows: int, last: Any, lanes: Any, count: Any
) -> list[Any]:
    """Vectors from the beginning of each row, with zeros beyond its first `count` lanes.

    No row is read beyond the `last`, counted from the first: that is read again instead.
    """
    places = []
    for r in range(rows):
        row = builder.select(builder.icmp_signed("<", last, integer(r)), last, integer(r))
        place = builder.add(address, builder.mul(row, step))
        places.append(builder.inttoptr(place, lanes.as_pointer()))
    if WIDE:
        return _read_masked(builder, places, lanes, count)
    # Without masks in registers LLVM loads number by number: those that are left over in a row.
    whole = builder.icmp_signed(">=", count, integer(lanes.count))
    with builder.if_else(whole) as (then, otherwise):
        with then:
            found = [builder.load(place) for place in places]
            for loaded in found:
                loaded.align = 2
            after_whole = builder.block
        with otherwise:
            parts = _read_masked(builder, places, lanes, count)
            after_part = builder.block
    either = []
    for one, other in zip(found, parts, strict=True):
        chosen = builder.phi(lanes)
        chosen.add_incoming(one, after_whole)
        chosen.add_incoming(other, after_part)
        either.append(chosen)
    return either


def _read_masked(builder: Any, places: list[Any], lanes: Any, count: Any) -> list[Any]:
    flags = ir.VectorType(ir.IntType(1), lanes.count)
    first = builder.sub(builder.shl(integer(1), count), integer(1))
    mask = builder.bitcast(builder.trunc(first, ir.IntType(lanes.count)), flags)
    load = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(lanes, [lanes.as_pointer(), I32, flags, lanes]),
        f"llvm.masked.load.v{lanes.count}i{lanes.element.width}.p0",
    )  # fmt: skip
    aligned, zeros = ir.Constant(I32, 2), ir.Constant(lanes, [0] * lanes.count)
    return [builder.call(load, [place, aligned, mask, zeros]) for place in places]


def _zipped(builder: Any, rows: list[Any]) -> list[Any]:
    """All lanes 0 side by side, then all lanes 1, and so on, of 2 or 4 rows."""
    if len(rows) == 1:
        return rows
    found = []
    for pair in zip(_zipped(builder, rows[::2]), _zipped(builder, rows[1::2]), strict=True):
        for half in (0, HALF):
            lanes = [half + i // 2 + LANES * (i % 2) for i in range(LANES)]
            found.append(pick(builder, *pair, lanes))
    return found


@intrinsic
def interleave(typing, x, step, last, count, packed):
    """Write LANES units of GROUP rows of x as that many times GROUP units side by side.

    As to `last` and `count`, see `_read`.
    """

    def code(context, builder, signature, arguments):
        x, step, last, count, packed = arguments
        rows = _read(builder, x, step, GROUP, last, _UNITS, count)
        for v, units in enumerate(_zipped(builder, rows)):
            store(builder, units, builder.add(packed, integer(4 * LANES * v)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), code


def _exchange(builder: Any, rows: list[Any], bit: int) -> list[Any]:
    """Swap a bit of the number of HALF rows with that of the columns of their halves."""
    both = [(i if not i & bit else i - bit + LANES) for i in range(LANES)]
    other = [(i + bit if not i & bit else i + LANES) for i in range(LANES)]
    swapped = list(rows)
    for r in range(HALF):
        if not r & bit:
            pair = rows[r], rows[r + bit]
            swapped[r] = pick(builder, *pair, both)
            swapped[r + bit] = pick(builder, *pair, other)
    return swapped


@intrinsic(prefer_literal=True)
def transpose(typing, form, w, step, last, count, panel):
    """Write LANES units of HALF rows of w, widened to 32 bits, as LANES rows of a panel.

    `count` is of numbers; see `_read`. 24 shuffles for 128 units, or 8 for 32.
    """
    kind = form.literal_value

    def code(context, builder, signature, arguments):
        w, step, last, count, panel = arguments[1:]
        if kind == FLOAT32:
            rows = _read(builder, w, step, HALF, last, _UNITS, count)
        else:
            numbers = LANES if kind in (BFLOAT16, FLOAT16) else 2 * LANES
            rows = _read(builder, w, step, HALF, last, ir.VectorType(I16, numbers), count)
        if kind == FLOAT16:
            half = ir.VectorType(ir.HalfType(), LANES)
            rows = [builder.fpext(builder.bitcast(row, half), _FLOATS) for row in rows]
        elif kind == BFLOAT16:
            rows = [from_bfloat16(builder, row) for row in rows]
        rows = [builder.bitcast(row, _UNITS) for row in rows]
        for bit in (1, 2, 4)[: HALF.bit_length() - 1]:
            rows = _exchange(builder, rows, bit)
        for k, row in enumerate(rows):
            for h in (0, HALF):
                half = pick(builder, row, row, list(range(h, h + HALF)))
                store(builder, half, builder.add(panel, integer(4 * COLUMNS * (k + h))))
        return context.get_dummy_value()

    return types.void(form, *[types.intp] * 5), code
