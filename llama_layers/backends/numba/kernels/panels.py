"""Panels of a matrix: packed for tiles, and multiplied by many tokens; see gemm.py."""

from __future__ import annotations

from llama_layers.backends.numba.kernel_dtypes import (
    BFLOAT16,
    BFLOAT16_PAIRS,
    FLOAT16,
    FLOAT32,
)
from llama_layers.backends.numba.kernels.jit import compiled
from llama_layers.backends.numba.kernels.llvm import LANES
from llama_layers.backends.numba.kernels.outer_tiles import (
    COLUMNS,
    GROUPS,
    HALF,
    ROWS,
    outer_tile,
    transpose,
)

LINE = 16  # units of a line of the caches
NEAR = 8 * LANES  # units of a row that are packed before those of other rows


@compiled
def pack_panel(form, w, step, rows, count, panel):
    """Up to COLUMNS rows of w, and `count` numbers of each, which are at most DEPTH units.

    Columns beyond the last row repeat it or are left as they were, and so are units beyond the last
    of K, or zero: nobody reads them. Reads each weight once, and writes 4 bytes a unit.
    """
    size = 4 if form == FLOAT32 else 2
    numbers = 2 if form == BFLOAT16_PAIRS else 1  # in a unit
    for begin in range(0, count, NEAR * numbers):
        end = min(begin + NEAR * numbers, count)
        for v in range(0, min(COLUMNS, rows), HALF):
            last = rows - 1 - v
            for k in range(begin, end, LANES * numbers):
                a = w + v * step + k * size
                b = panel + 4 * (v + k // numbers * COLUMNS)
                left = min(LANES * numbers, end - k)
                if form == FLOAT32:
                    transpose(FLOAT32, a, step, last, left, b)
                elif form == BFLOAT16:
                    transpose(BFLOAT16, a, step, last, left, b)
                elif form == FLOAT16:
                    transpose(FLOAT16, a, step, last, left, b)
                else:
                    transpose(BFLOAT16_PAIRS, a, step, last, left, b)


@compiled
def panel_times(packed, x, apart, groups, panel, depth, begin, step, sums, ahead, row, width):
    """Sums of some groups of tokens by a panel; the next will have `width` bytes a row of `ahead`.

    The other arguments are those of `outer_tile`.
    """
    tiles, lines = -(-groups // GROUPS), width // 64 + 1
    for i in range(tiles):
        line = lines * i // tiles
        some = lines * (i + 1) // tiles - line
        a, b, c = x + GROUPS * apart * i, begin + ROWS * step * i, sums + 4 * COLUMNS * ROWS * i
        soon, left = ahead + 64 * line, groups - GROUPS * i
        if left >= GROUPS:
            outer_tile(GROUPS, packed, a, apart, panel, depth, b, step, c, soon, row, some)
        elif left == 2:
            outer_tile(2, packed, a, apart, panel, depth, b, step, c, soon, row, some)
        else:
            outer_tile(1, packed, a, apart, panel, depth, b, step, c, soon, row, some)
