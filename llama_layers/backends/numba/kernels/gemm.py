"""Products of many tokens, compiled for AVX2 or AVX-512: float32 by any weights, and bfloat16.

y [M, N] = x [M, K] times the transposed w [N, K] does 2 M operations with each weight, so from
M = 16 or so on arithmetic is the limit, and what counts is that its operands come from registers
and near caches. x is packed once, by all threads. Then each thread takes its rows of w in panels of
COLUMNS rows, up to DEPTH units of K at a time, and packs each, widened and transposed, when it is
read, which happens once for every TILES tiles of tokens; no matrix is ever widened as a whole.
Blocks of K are of one size, and so are those of tokens.

A unit is one float32, or, of bfloat16 times bfloat16, a pair of numbers, which AVX512_BF16
multiplies and adds in one instruction. Either fills a lane of 32 bits, and only the packing and
that instruction differ.

A tile of ROWS tokens by COLUMNS columns keeps its sums in registers, 24 vectors of 16 lanes with
AVX-512 and 12 of 8 with AVX2. For a unit of K it reads 2 vectors of the panel and a unit of each
token and does ROWS COLUMNS multiply-adds: 176 bytes for 768 operations (1536 with pairs), or 88 for
192. A Zen 4 core starts one such instruction a cycle, a Zen 3 two of half the length, so that 7 or
15 bytes a cycle have to come from their caches:

==================  ==========================  =======  =======  ===============================
what                bytes, at most              AVX-512  AVX2     read again
==================  ==========================  =======  =======  ===============================
panel of w          4 COLUMNS DEPTH             128 K    48 K     by every tile, from L1 or L2
block of x          4 TILES ROWS DEPTH          2112 K   1548 K   by every panel, from L2 or L3
sums                4 TILES ROWS COLUMNS        66 K     32 K     for every block of K, and written
==================  ==========================  =======  =======  ===============================

Packing a panel takes 48 shuffles for 16 x 16 units with AVX-512, one a cycle, and half as long
again for loads and stores: 4 % of the time of the multiply-adds of 128 tokens. To wait for memory
would take longer than that, so the rows of the next panel are fetched while tiles multiply by this
one. Rows a power of two apart fall on few sets of the nearest cache, which holds 8 of them: so 8
rows, or 4, are transposed at once, and NEAR units of each before the next, lest lines of the panel
leave it half written.

A block's units are added up from zero in their order, and the blocks' sums in theirs, from the bias
on. Neither the number of tokens nor that of threads nor a row's place changes this, so that a
token's result does not depend on its neighbours.

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
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.backends.numba.array_pool import empty
from llama_layers.backends.numba.kernel_dtypes import (
    BFLOAT16_PAIRS,
    FLOAT32,
    KERNEL_DTYPES,
    ready,
)
from llama_layers.backends.numba.kernels.jit import compiled
from llama_layers.backends.numba.kernels.llvm import LANES, WIDE, arrive
from llama_layers.backends.numba.kernels.outer_tiles import (
    COLUMNS,
    GROUP,
    GROUPS,
    ROWS,
    interleave,
)
from llama_layers.backends.numba.kernels.panels import LINE, pack_panel, panel_times
from llama_layers.backends.numba.kernels.processor import missing
from llama_layers.backends.numba.kernels.spin_wait import spin_until

DEPTH = 1024 if WIDE else 768  # units of K in a panel at most
TILES = 44 if WIDE else 86  # of tokens that pass a panel before it is packed again, at most
CHUNK = 8  # groups of tokens that a thread packs at a time


def problem(x: str, weight: str) -> str | None:
    """Why nothing here multiplies x by a weight of these dtypes on this processor, or None."""
    if (x, weight) != ("bfloat16", "bfloat16") and (x != "float32" or weight not in KERNEL_DTYPES):
        return f"no kernel for x of {x} and a weight of {weight}"
    needed = ("avx512f", "avx512bw", "avx512bf16") if x == "bfloat16" else ("avx2", "fma", "f16c")
    feature = missing(*needed)
    if feature is not None:
        return f"the processor has no {feature}, or numba is told not to use it"
    return None


class Product(NamedTuple):
    """One product y [M, N] = x @ weight.T + bias, for all threads; the caller holds the weight."""

    x: NDArray[Any]  # units [M, units]
    packed: NDArray[Any]  # memory for x as tiles read it; see `_pack`
    dtype: int  # of the weight
    weight: int  # its address
    step: int  # bytes from a row of it to the next
    rows: int
    count: int  # numbers of a row, K
    bias: NDArray[np.float32]  # zeros if there is none; longer than the rows by a panel
    panels: NDArray[np.uint32]  # memory for a panel of each thread
    sums: NDArray[np.float32]  # and for the sums of one
    y: NDArray[Any]


def product(
    x: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[np.float32] | None,
    y: NDArray[Any],
    threads: int,
) -> Product:
    """The record that each thread gives to `multiply`, to write y [M, N] = x @ weight.T + bias.

    Parameters
    ----------
    x : ndarray, shape [M, K]
        Float32 or bfloat16.
    weight : ndarray, shape [N, K]
        With adjacent columns: bfloat16 if x is, else float32, float16 or bfloat16. Its address is
        kept, and not the array.
    bias : ndarray of float32, shape [N], or None
        Added to each row.
    y : ndarray, shape [M, N]
        Of the dtype of x, contiguous.
    threads : int
        The number of threads. They need not run at the same time.

    Returns
    -------
    Product
        For one use.
    """
    rows, count = weight.shape
    form, unit, written = KERNEL_DTYPES[dtype_name(weight.dtype)], np.float32, y
    if x.dtype != np.float32:
        form, unit, written = BFLOAT16_PAIRS, np.uint32, y.view(np.uint16)
        if count % 2:
            even = np.zeros((len(x), count + 1), x.dtype)
            even[:, :count] = x
            x = even
    x = ready(x, x.dtype).view(unit)
    groups, units = -(-len(x) // GROUP), x.shape[1]
    blocks = max(1, -(-units // DEPTH))  # one writes the bias if there is nothing to add to it
    depth = -(-units // (blocks * LANES)) * LANES
    # One line more, lest the groups of a tile compete for a set of the cache.
    packed = empty((blocks, groups, GROUP * depth + LINE), unit)
    first = np.zeros(rows + COLUMNS, np.float32)
    if bias is not None:
        first[:rows] = bias
    panels = empty((threads, COLUMNS * depth + LINE), np.uint32)
    sums = empty((threads, min(TILES * ROWS, groups * GROUP), COLUMNS), np.float32)
    return Product(
        x, packed, form, weight.ctypes.data, weight.strides[0], rows, count, first, panels, sums,
        written,
    )  # fmt: skip


@compiled
def _pack(sync, x, packed):
    """Lay x [M, units] out as tiles read it: [blocks of K, groups, GROUP * depth and a line].

    A group has unit k of each of its tokens side by side. The threads take chunks of groups in
    turn, since some wake later than others, and wait until all are packed. x is read and written
    once.
    """
    tokens, units = x.shape
    blocks, groups, length = packed.shape
    depth = (length - LINE) // GROUP
    chunks = (groups + CHUNK - 1) // CHUNK
    taken, finished = sync.ctypes.data, sync.ctypes.data + 8
    chunk = arrive(taken)
    while chunk < chunks:
        for group in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, groups)):
            token = group * GROUP
            for block in range(blocks):
                a = x.ctypes.data + 4 * (token * units + block * depth)
                b = packed.ctypes.data + 4 * length * (block * groups + group)
                left = min(depth, units - block * depth)
                for k in range(0, left, LANES):
                    last, count = tokens - 1 - token, min(LANES, left - k)
                    interleave(a + 4 * k, 4 * units, last, count, b + 4 * GROUP * k)
        arrive(finished)
        chunk = arrive(taken)
    spin_until(finished, chunks, finished + 8)


@compiled
def _bfloat16(bits):
    """A float32's bits rounded to bfloat16, to nearest, ties to even; NaN stays NaN."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@compiled
def _write(sums, y):
    """Sums [tokens, columns] to their places in y, which is float32 or the bits of bfloat16."""
    bits = sums.view(np.uint32)
    for i in range(y.shape[0]):
        row = y[i]
        for j in range(y.shape[1]):
            row[j] = _bfloat16(bits[i, j]) if y.itemsize == 2 else sums[i, j]


@compiled
def multiply(thread, threads, sync, product):
    """Write one thread's columns of y. `sync` are three zeros that the threads share.

    Addresses are of arrays that the caller holds: numba frees its own after their last use by name.
    """
    packed, y = product.packed, product.y
    form, w_step, rows, count = product.dtype, product.step, product.rows, product.count
    _pack(sync, product.x, packed)
    blocks, groups, length = packed.shape
    depth = (length - LINE) // GROUP
    numbers = depth * (2 if form == BFLOAT16_PAIRS else 1)  # of a row in a panel
    size = 4 if form == FLOAT32 else 2
    panel = (product.panels[thread].ctypes.data + 63) // 64 * 64
    sums = product.sums[thread]
    total = sums.ctypes.data
    tiles, all_panels = -(-groups // GROUPS), -(-rows // COLUMNS)
    parts = -(-tiles // TILES)
    for p in range(all_panels * thread // threads, all_panels * (thread + 1) // threads):
        column = p * COLUMNS
        columns = min(COLUMNS, rows - column)
        first = product.weight + column * w_step
        for part in range(parts):
            start, stop = tiles * part // parts * GROUPS, tiles * (part + 1) // parts * GROUPS
            stop = min(stop, groups)
            for block in range(blocks):
                left = min(numbers, count - block * numbers)
                units = (left + 1) // 2 if form == BFLOAT16_PAIRS else left
                here = first + block * numbers * size
                ahead = here + numbers * size if block + 1 < blocks else first + COLUMNS * w_step
                pack_panel(form, here, w_step, columns, left, panel)
                if block == 0:
                    begin, step = product.bias.ctypes.data + 4 * column, 0
                else:
                    begin, step = total, 4 * COLUMNS
                a = packed.ctypes.data + 4 * length * (block * groups + start)
                panel_times(
                    packed, a, 4 * length, stop - start, panel, units, begin, step, total, ahead,
                    w_step, numbers * size,
                )  # fmt: skip
            token, end = start * GROUP, min(stop * GROUP, y.shape[0])
            _write(sums[: end - token, :columns], y[token:end, column : column + columns])
