"""The vectors of the product of many tokens, written in LLVM; see gemm.py for what they are for.

A unit is what fills a lane of 32 bits: one float32, or a pair of bfloat16 numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama_layers.backends.numba.formats import BFLOAT16, FLOAT16, FLOAT32
from llama_layers.backends.numba.processor import missing

# AVX-512 has 32 registers of 16 lanes, and masks for any load; AVX2 has 16 registers of 8. A tile's
# sums take 24 or 12 of them, two what it multiplies by, and one or more a token.
WIDE = missing("avx512f", "avx512bw") is None
LANES = 16 if WIDE else 8
HALF = LANES // 2
VECTORS = 2  # of columns in a tile
COLUMNS = VECTORS * LANES  # of y, rows of w, in a panel
GROUP = 4 if WIDE else 2  # tokens that are packed together
GROUPS = 3  # in a tile, or fewer in the last
ROWS = GROUPS * GROUP  # tokens in a tile
STEP = 1 if WIDE else 4  # units after which a line is fetched: that takes ten instructions

_I64, _I32, _I16, _I8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
_UNITS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(ir.FloatType(), LANES)


def _integer(value: int) -> Any:
    return ir.Constant(_I64, value)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 4
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _picked(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """Some lanes of two vectors side by side."""
    kind = ir.VectorType(_I32, len(lanes))
    return builder.shuffle_vector(a, b, ir.Constant(kind, lanes))


def _fetch(builder: Any, place: Any, ahead: Any, step: Any, lines: Any) -> None:
    """Fetch a line of memory, which need not exist.

    `place` says which of the rows at `ahead`, `step` apart, in parts of 2**16: each row has its
    `lines` in such order.
    """
    part = builder.and_(place, _integer(0xFFFF))
    line = builder.lshr(builder.mul(part, lines), _integer(16))
    row = builder.mul(builder.lshr(place, _integer(16)), step)
    address = builder.add(builder.add(ahead, row), builder.shl(line, _integer(6)))
    pointer = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, near, data = (ir.Constant(_I32, n) for n in (0, 3, 1))
    builder.call(prefetch, [builder.inttoptr(address, pointer), read, near, data])


@intrinsic(prefer_literal=True)
def tile(typing, groups, packed, x, apart, panel, depth, begin, step, sums, ahead, row, lines):
    """Write rows of sums: what is at `begin`, and `depth` units of `groups` groups by a panel.

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
            a = builder.add(x, builder.mul(k, _integer(4 * GROUP)))
            b = builder.add(panel, builder.mul(k, _integer(4 * COLUMNS)))
            columns = [
                _load(builder, builder.add(b, _integer(4 * LANES * v)), operand)
                for v in range(VECTORS)
            ]
            for r in range(rows):
                group = builder.add(a, builder.mul(apart, _integer(r // GROUP)))
                address = builder.add(group, _integer(4 * (r % GROUP)))
                one = _load(builder, address, ir.VectorType(operand.element, 1))
                token = _picked(builder, one, one, [0] * LANES)
                for v in range(VECTORS):
                    total = builder.load(totals[r, v])
                    terms = (total, token, columns[v]) if pairs else (token, columns[v], total)
                    builder.store(builder.call(multiply_add, terms), totals[r, v])

        steps = builder.udiv(depth, _integer(STEP))
        # of a row to be fetched with a step, in parts of 2**16; there may be none
        rate = builder.udiv(_integer(COLUMNS << 16), builder.add(steps, _integer(1)))
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            _fetch(builder, builder.mul(loop.index, rate), *fetched)
            for more in range(STEP):
                add_unit(builder.add(builder.mul(loop.index, _integer(STEP)), _integer(more)))
        if STEP > 1:
            begun = builder.mul(steps, _integer(STEP))
            with cgutils.for_range_slice(builder, begun, depth, _integer(1), _I64) as (k, _):
                add_unit(k)
        for (r, v), total in totals.items():
            place = builder.add(begin, builder.mul(step, _integer(r)))
            before = _load(builder, builder.add(place, _integer(4 * LANES * v)), _FLOATS)
            address = builder.add(sums, _integer(4 * (COLUMNS * r + LANES * v)))
            _store(builder, builder.fadd(before, builder.load(total)), address)
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
        row = builder.select(builder.icmp_signed("<", last, _integer(r)), last, _integer(r))
        place = builder.add(address, builder.mul(row, step))
        places.append(builder.inttoptr(place, lanes.as_pointer()))
    if WIDE:
        return _read_masked(builder, places, lanes, count)
    # Without masks in registers LLVM loads number by number: those that are left over in a row.
    whole = builder.icmp_signed(">=", count, _integer(lanes.count))
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
    first = builder.sub(builder.shl(_integer(1), count), _integer(1))
    mask = builder.bitcast(builder.trunc(first, ir.IntType(lanes.count)), flags)
    load = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(lanes, [lanes.as_pointer(), _I32, flags, lanes]),
        f"llvm.masked.load.v{lanes.count}i{lanes.element.width}.p0",
    )  # fmt: skip
    aligned, zeros = ir.Constant(_I32, 2), ir.Constant(lanes, [0] * lanes.count)
    return [builder.call(load, [place, aligned, mask, zeros]) for place in places]


def _zipped(builder: Any, rows: list[Any]) -> list[Any]:
    """All lanes 0 side by side, then all lanes 1, and so on, of 2 or 4 rows."""
    if len(rows) == 1:
        return rows
    found = []
    for pair in zip(_zipped(builder, rows[::2]), _zipped(builder, rows[1::2]), strict=True):
        for half in (0, HALF):
            lanes = [half + i // 2 + LANES * (i % 2) for i in range(LANES)]
            found.append(_picked(builder, *pair, lanes))
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
            _store(builder, units, builder.add(packed, _integer(4 * LANES * v)))
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
            swapped[r] = _picked(builder, *pair, both)
            swapped[r + bit] = _picked(builder, *pair, other)
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
            rows = _read(builder, w, step, HALF, last, ir.VectorType(_I16, numbers), count)
        if kind == FLOAT16:
            half = ir.VectorType(ir.HalfType(), LANES)
            rows = [builder.fpext(builder.bitcast(row, half), _FLOATS) for row in rows]
        elif kind == BFLOAT16:  # the upper half of a float32
            sixteen = ir.Constant(_UNITS, [16] * LANES)
            rows = [builder.shl(builder.zext(row, _UNITS), sixteen) for row in rows]
        rows = [builder.bitcast(row, _UNITS) for row in rows]
        for bit in (1, 2, 4)[: HALF.bit_length() - 1]:
            rows = _exchange(builder, rows, bit)
        for k, row in enumerate(rows):
            for h in (0, HALF):
                half = _picked(builder, row, row, list(range(h, h + HALF)))
                _store(builder, half, builder.add(panel, _integer(4 * COLUMNS * (k + h))))
        return context.get_dummy_value()

    return types.void(form, *[types.intp] * 5), code
