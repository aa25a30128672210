"""Products of many tokens, compiled for AVX-512: float32 by any weights, bfloat16 by bfloat16.

y [M, N] = x [M, K] times the transposed w [N, K] does 2 M operations with each weight, so from
M = 16 or so on arithmetic is the limit, and what counts is that its operands come from registers
and near caches. x is packed once. A thread takes its rows of w in panels of COLUMNS rows, DEPTH
units of K at a time, and packs each, widened and transposed, when it is read, which happens once
for every TOKENS tokens; no matrix is ever widened as a whole.

A unit is one float32, or a pair of bfloat16 numbers, which AVX512_BF16 multiplies and adds in one
instruction. Either fills a lane of 32 bits, and only the packing and that instruction differ.

A tile of ROWS tokens by COLUMNS columns keeps its 24 vectors of sums in registers. For a unit of K
it reads 2 vectors of the panel and 12 units of x and does 24 multiply-adds of 32 operations (64
with pairs): 176 bytes for 768 (1536) operations. A Zen 4 core starts one such instruction a
cycle, so that 7 bytes a cycle have to come from its caches:

==================  ============================  ==============================================
what                bytes                         read again, from L2 or L3
==================  ============================  ==============================================
panel of w          4 COLUMNS DEPTH, 64 K         by every tile
block of x          4 TOKENS DEPTH, 1008 K        by every panel
sums of a group     4 TOKENS PANELS COLUMNS,      for every block of K, and written
                    252 K
==================  ============================  ==============================================

A panel is packed with 64 shuffles for 16 x 16 units, 2 a cycle, and used for 2 M operations a
weight: a few per cent of the time at M = 128.

A block's DEPTH units are added up from zero in their order, and the blocks' sums in theirs, from
the bias on. Neither the number of tokens nor that of threads nor a row's place changes this, so
that a token's result does not depend on its neighbours.

Rounding. With float32 every term is one fused multiply-add. A term takes part in at most as many
roundings as its block has terms, and one more for each addition of two blocks or of the bias:
never more than the n = K (+ 1 with a bias) of `linear_bound`, which holds as it is. VDPBF16PS, by
the pseudocode in Intel's Software Developer's Manual (a Zen 4 does the same to the bit), does

    sum = fma(x[2i + 1], w[2i + 1], sum); sum = fma(x[2i], w[2i], sum)

each rounded to the nearest float32, ties to even, whatever the mode that is set. Two bfloat16
significands of 8 bits make a product of 16, exact in float32, so this again is a sum of n terms
with a rounding each, in another order: gamma_n holds. But subnormal inputs count as zero, which
loses up to 2**-126 (|x_i| + |w_i|) of a term, and a sum below 2**-126 becomes zero, which loses
that much, K times at most; later roundings can make that (1 + gamma_n) times as much. All is
within 2**-126 (sum |x_i| + sum |w_i| + 2 n), the term of ``linear_bound(..., flushes=True)``. One
result lies outside: infinity times a subnormal number is NaN here, and infinite by definition.
Padding adds 0 * 0, which changes no sum.

numba does not notice if what a compiled function calls has changed in another file, so the kernels
and all that they call are in this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from llama_layers.backends.dtypes import dtype_name
from llama_layers.backends.numpy.fast.formats import BFLOAT16, FLOAT16, FLOAT32, KINDS

LANES = 16
VECTORS = 2  # of columns in a tile
COLUMNS = VECTORS * LANES  # of y, rows of w, in a panel
GROUP = 4  # tokens that are packed together, and in the tiles that are left over
GROUPS = 3  # in other tiles
ROWS = GROUPS * GROUP  # tokens in a tile
DEPTH = 512  # units of K in a panel
TOKENS = 42 * ROWS  # that pass a panel before it is packed again
PANELS = 4  # whose sums are kept at a time
# Units of a packed group; one line more, lest the groups of a tile compete for a set of the cache.
GROUP_STEP = GROUP * DEPTH + LANES

PAIRS = len(KINDS)  # of bfloat16: one more form of a unit than there are of numbers

_I64, _I32, _I16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_UNITS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


def problem(x: str, weight: str) -> str | None:
    """Why nothing here multiplies x by a weight of these dtypes on this processor, or None."""
    if (x, weight) != ("bfloat16", "bfloat16") and (x != "float32" or weight not in KINDS):
        return f"no kernel for x of {x} and a weight of {weight}"
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    for feature in ("avx512f", "avx512bw", "avx512bf16" if x == "bfloat16" else "avx512f"):
        if f"+{feature}" not in features:
            return f"the processor has no {feature}, or numba is told not to use it"
    return None


def pack(x: NDArray[Any]) -> NDArray[Any]:
    """Lay x [M, K] out as `multiply` reads it: [blocks of K, groups, GROUP_STEP].

    Float32 or bfloat16.

    A group has unit k of each of its GROUP tokens side by side; float32, or pairs of bfloat16 as
    uint32. M K numbers are read and written once.
    """
    tokens, count = x.shape
    if x.dtype != np.float32:
        if count % 2 or x.strides[1] != x.itemsize:
            even = np.zeros((tokens, count + count % 2), x.dtype)
            even[:, :count] = x
            x = even
        x = x.view(np.uint32)
    units = x.shape[1]
    blocks = max(1, -(-units // DEPTH))  # one writes the bias if there is nothing to add to it
    packed = np.zeros((blocks, -(-tokens // GROUP), GROUP_STEP), x.dtype)
    _pack(x.ctypes.data, *x.strides, tokens, units, packed.view(np.uint32))
    return packed


def multiply(
    thread: int,
    team: int,
    packed: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[np.float32] | None,
    y: NDArray[Any],
) -> None:
    """Write one thread's columns of y [M, N] = x @ weight.T + bias.

    Parameters
    ----------
    thread, team : int
        Which thread of how many calls. They need not run at the same time.
    packed : ndarray
        What `pack` made of x [M, K].
    weight : ndarray, shape [N, K]
        With adjacent columns: bfloat16 if x is, else float32, float16 or bfloat16.
    bias : ndarray of float32, shape [N], or None
        Added to each row.
    y : ndarray, shape [M, N], contiguous in C or Fortran order
        Of the dtype of x.
    """
    rows, count = weight.shape
    pairs = packed.dtype != np.float32
    tokens = len(y)
    panels = -(-rows // COLUMNS)
    start, stop = (panels * t // team * COLUMNS for t in (thread, thread + 1))
    flat = y.reshape(-1) if (by_rows := y.flags.c_contiguous) else y.T.reshape(-1)
    steps = (rows, 1) if by_rows else (1, tokens)
    panel = np.empty(COLUMNS * DEPTH + LANES, np.uint32)
    sums = np.empty((PANELS, min(TOKENS, packed.shape[1] * GROUP), COLUMNS), np.float32)
    first = np.zeros(rows + COLUMNS, np.float32)
    if bias is not None:
        first[:rows] = bias
    _multiply(
        packed, PAIRS if pairs else KINDS[dtype_name(weight.dtype)], weight.ctypes.data,
        weight.strides[0], rows, count, first, flat.view(np.uint16) if pairs else flat, *steps,
        tokens, start, min(stop, rows), panel, sums,
    )  # fmt: skip


def _integer(value: int) -> Any:
    return ir.Constant(_I64, value)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 4
    return loaded


@intrinsic(prefer_literal=True)
def _tile(typing, groups, packed, x, panel, depth, begin, step, sums):
    """Write rows of sums: what is at `begin`, and `depth` units of `groups` groups by a panel.

    The type of `packed` says what a unit is; x, panel, begin and sums are addresses, and `step` is
    that from a row at `begin` to the next.
    """
    rows = GROUP * groups.literal_value
    pairs = packed.dtype == types.uint32
    operand, name = (_UNITS, "x86.avx512bf16.dpbf16ps.512") if pairs else (_FLOATS, "fma.v16f32")

    def code(context, builder, signature, arguments):
        x, panel, depth, begin, step, sums = arguments[2:]
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
        everywhere = ir.Constant(_UNITS, [0] * LANES)
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            a = builder.add(x, builder.mul(loop.index, _integer(4 * GROUP)))
            b = builder.add(panel, builder.mul(loop.index, _integer(4 * COLUMNS)))
            columns = [
                _load(builder, builder.add(b, _integer(4 * LANES * v)), operand)
                for v in range(VECTORS)
            ]
            for r in range(rows):
                offset = 4 * (r // GROUP * GROUP_STEP + r % GROUP)
                one = _load(
                    builder, builder.add(a, _integer(offset)), ir.VectorType(operand.element, 1)
                )
                token = builder.shuffle_vector(one, one, everywhere)
                for v in range(VECTORS):
                    total = builder.load(totals[r, v])
                    terms = (total, token, columns[v]) if pairs else (token, columns[v], total)
                    builder.store(builder.call(multiply_add, terms), totals[r, v])
        for (r, v), total in totals.items():
            row = builder.add(begin, builder.mul(step, _integer(r)))
            before = _load(builder, builder.add(row, _integer(4 * LANES * v)), _FLOATS)
            address = builder.add(sums, _integer(4 * (COLUMNS * r + LANES * v)))
            pointer = builder.inttoptr(address, _FLOATS.as_pointer())
            builder.store(builder.fadd(before, builder.load(total)), pointer).align = 4
        return context.get_dummy_value()

    return types.void(groups, packed, *[types.intp] * 6), code


def _exchange(builder: Any, rows: list[Any], bit: int) -> list[Any]:
    """Swap a bit of the number of 16 rows with that of their 16 columns."""
    both = [(i if not i & bit else i - bit + LANES) for i in range(LANES)]
    other = [(i + bit if not i & bit else i + LANES) for i in range(LANES)]
    swapped = list(rows)
    for r in range(LANES):
        if not r & bit:
            pair = rows[r], rows[r + bit]
            swapped[r] = builder.shuffle_vector(*pair, ir.Constant(_UNITS, both))
            swapped[r + bit] = builder.shuffle_vector(*pair, ir.Constant(_UNITS, other))
    return swapped


@intrinsic(prefer_literal=True)
def _transpose(typing, form, w, step, last, count, panel):
    """Write 16 units of 16 rows of w, widened to 32 bits, as 16 rows of 16 lanes of a panel.

    Of the numbers of a row only `count` are read, and no row beyond the `last`, counted from the
    first: that is read again instead. 64 shuffles for 256 units.
    """
    kind = form.literal_value
    halves = LANES if kind in (BFLOAT16, FLOAT16) else 2 * LANES
    stored, mask = ir.VectorType(_I16, halves), ir.VectorType(ir.IntType(1), halves)

    def code(context, builder, signature, arguments):
        w, step, last, count, panel = arguments[1:]
        if kind == FLOAT32:
            count = builder.mul(count, _integer(2))
        masked = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(mask, [_I64, _I64]),
            f"llvm.get.active.lane.mask.v{halves}i1.i64",
        )  # fmt: skip
        read = builder.call(masked, [_integer(0), count])
        pointer = stored.as_pointer()
        load = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(stored, [pointer, _I32, mask, stored]),
            f"llvm.masked.load.v{halves}i16.p0",
        )  # fmt: skip
        zeros = ir.Constant(stored, [0] * halves)
        rows = []
        for r in range(LANES):
            row = builder.select(builder.icmp_signed("<", last, _integer(r)), last, _integer(r))
            address = builder.inttoptr(builder.add(w, builder.mul(row, step)), pointer)
            units = builder.call(load, [address, ir.Constant(_I32, 2), read, zeros])
            if kind == FLOAT16:
                half = ir.VectorType(ir.HalfType(), LANES)
                units = builder.fpext(builder.bitcast(units, half), _FLOATS)
            elif kind == BFLOAT16:  # the upper half of a float32
                sixteen = ir.Constant(_UNITS, [16] * LANES)
                units = builder.shl(builder.zext(units, _UNITS), sixteen)
            rows.append(builder.bitcast(units, _UNITS))
        for bit in (1, 2, 4, 8):
            rows = _exchange(builder, rows, bit)
        for k, row in enumerate(rows):
            address = builder.add(panel, _integer(4 * COLUMNS * k))
            builder.store(row, builder.inttoptr(address, _UNITS.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(form, *[types.intp] * 5), code


@intrinsic
def _unit(typing, address):
    """The unit at an address."""

    def code(context, builder, signature, arguments):
        return _load(builder, arguments[0], _I32)

    return types.uint32(types.intp), code


_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _pack(x, token_step, unit_step, tokens, units, packed):
    for block in range(packed.shape[0]):
        first = block * DEPTH
        for g in range(packed.shape[1]):
            group = packed[block, g]
            a = x + g * GROUP * token_step + first * unit_step
            if (g + 1) * GROUP <= tokens:
                for k in range(min(DEPTH, units - first)):
                    for i in range(GROUP):
                        group[GROUP * k + i] = _unit(a + i * token_step + k * unit_step)
            else:
                for k in range(min(DEPTH, units - first)):
                    for i in range(tokens - g * GROUP):
                        group[GROUP * k + i] = _unit(a + i * token_step + k * unit_step)


@_compiled
def _pack_panel(form, w, step, rows, count, panel):
    """Up to COLUMNS rows of w, and `count` numbers of each, which are at most DEPTH units.

    Columns beyond the last row repeat it, and units beyond the last of K are zero or left as they
    were: nobody reads them. Reads each weight once, and writes 4 bytes a unit.
    """
    size = 4 if form == FLOAT32 else 2
    numbers = 2 * LANES if form == PAIRS else LANES
    for v in range(0, COLUMNS, LANES):
        last = rows - 1 - v
        if last < 0:
            break
        for k in range(0, count, numbers):
            a = w + v * step + k * size
            b = panel + 4 * (v + k // numbers * LANES * COLUMNS)
            left = min(numbers, count - k)
            if form == FLOAT32:
                _transpose(FLOAT32, a, step, last, left, b)
            elif form == BFLOAT16:
                _transpose(BFLOAT16, a, step, last, left, b)
            elif form == FLOAT16:
                _transpose(FLOAT16, a, step, last, left, b)
            else:
                _transpose(PAIRS, a, step, last, left, b)


@_compiled
def _bfloat16(bits):
    """A float32's bits rounded to bfloat16, to nearest, ties to even; NaN stays NaN."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@_compiled
def _write(sums, y, y_token, y_column):
    """Sums [tokens, columns] to their places in y, which is float32 or the bits of bfloat16."""
    bits = sums.view(np.uint32)
    tokens, columns = sums.shape
    if y_column == 1:
        for i in range(tokens):
            row = y[i * y_token : i * y_token + columns]
            for j in range(columns):
                row[j] = _bfloat16(bits[i, j]) if y.itemsize == 2 else sums[i, j]
    else:
        for j in range(columns):
            column = y[j * y_column : j * y_column + tokens]
            for i in range(tokens):
                column[i] = _bfloat16(bits[i, j]) if y.itemsize == 2 else sums[i, j]


@_compiled
def _multiply(
    packed, form, w, step, rows, count, bias, y, y_token, y_column, tokens, start, stop, panel, sums
):
    # Addresses are of arrays that the caller holds: numba frees its own after their last use by
    # name.
    size = 4 if form == FLOAT32 else 2
    numbers = DEPTH * (2 if form == PAIRS else 1)  # of a row in a panel
    aligned = (panel.ctypes.data + 63) // 64 * 64
    groups = packed.shape[1]
    for column in range(start, stop, PANELS * COLUMNS):
        panels = min(PANELS, -(-(stop - column) // COLUMNS))
        for token in range(0, tokens, TOKENS):
            padded = min(TOKENS, GROUP * groups - token)
            for block in range(packed.shape[0]):
                k = block * numbers
                left = min(numbers, count - k)
                depth = (left + 1) // 2 if form == PAIRS else left
                x = packed.ctypes.data + 4 * GROUP_STEP * (block * groups + token // GROUP)
                for p in range(panels):
                    first = column + p * COLUMNS
                    _pack_panel(
                        form, w + first * step + k * size, step, stop - first, left, aligned
                    )
                    total = sums.ctypes.data + 4 * COLUMNS * p * sums.shape[1]
                    if block == 0:
                        begin, row = bias.ctypes.data + 4 * first, 0
                    else:
                        begin, row = total, 4 * COLUMNS
                    i = 0
                    while i < padded:
                        a, b, c = x + GROUP_STEP * i, begin + row * i, total + 4 * COLUMNS * i
                        if i + ROWS <= padded:
                            _tile(GROUPS, packed, a, aligned, depth, b, row, c)
                            i += ROWS
                        else:
                            _tile(1, packed, a, aligned, depth, b, row, c)
                            i += GROUP
            for p in range(panels):
                first = column + p * COLUMNS
                place = token * y_token + first * y_column
                found = sums[p, : min(TOKENS, tokens - token), : min(COLUMNS, stop - first)]
                _write(found, y[place:], y_token, y_column)
