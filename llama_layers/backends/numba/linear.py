"""Products with every row of a matrix, in compiled code where that is faster than BLAS."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dispatch import takes
from llama_layers.arrays.dtypes import accumulate_format, dtype_name, float_format
from llama_layers.backends.numba.formats import FLOAT32, MOST, ROWS, kind_of, readable, ready
from llama_layers.backends.numba.team import TEAM, threads
from llama_layers.backends.numpy.memory import empty
from llama_layers.backends.numpy.sizes import small

LONELY = 1 << 16  # numbers of a matrix that one thread multiplies sooner than a second wakes
# Float32 numbers that BLAS multiplies by a few tokens within a millisecond: not worth loading numba
# for.
SMALL = 1 << 22


def _multiplied(xp: Any, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None) -> bool:
    """Whether a kernel multiplies them."""
    kind = readable(weight)
    if (
        kind is None
        or kind_of(x.dtype) is None
        or len(x) == 0
        or len(weight) < ROWS
        or not weight.flags.c_contiguous
    ):
        return False
    if len(x) <= MOST:
        return kind != FLOAT32 or not small(weight.size, SMALL)
    from llama_layers.backends.numba import gemm  # loads numba, which takes a while

    return gemm.problem(dtype_name(x.dtype), dtype_name(weight.dtype)) is None


@takes(_multiplied)
def linear_2d(
    xp: Any, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None
) -> NDArray[Any]:
    """``x @ weight.T + bias`` for x [M, K], weight [N, K]: each weight is read once."""
    kind = readable(weight)
    assert kind is not None  # or it is not taken
    size = threads() if weight.size > LONELY else 1
    if len(x) <= MOST:
        return _few(x, weight, bias, kind, size)
    return _many(x, weight, bias, size)


def _few(
    x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, kind: int, size: int
) -> NDArray[Any]:
    """Limited by the reading of the weights."""
    from llama_layers.backends.numba import kernels  # loads numba, which takes a while

    rows = ready(x, np.float32)
    y = np.empty((len(x), len(weight)), np.float32)
    TEAM.run(size, kernels.product, kind, weight.ctypes.data, len(weight), rows, y)
    if bias is not None:
        y += bias.astype(np.float32, copy=False)
    return y.astype(x.dtype, copy=False)


def _many(
    x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None, size: int
) -> NDArray[Any]:
    """Limited by arithmetic; 16-bit weights are not widened as a whole."""
    from llama_layers.backends.numba import gemm

    y = empty((len(x), len(weight)), x.dtype)
    wide = None if bias is None else bias.astype(np.float32, copy=False)
    operands = gemm.operands(x, weight, wide, y, size)
    TEAM.run(size, gemm.multiply, *operands, stop=operands[0])
    return y


def _in_order(xp: Any, x: NDArray[Any]) -> bool:
    """Whether kernels will compute the products of this many tokens."""
    if x.size <= MOST * x.shape[-1]:
        return True
    from llama_layers.backends.numba import gemm

    return gemm.problem("float32", "float32") is None


@takes(_in_order)
def activations(xp: Any, x: NDArray[Any]) -> NDArray[Any]:
    """Embeddings widened to float32 at least, in the order of memory that products will have."""
    return np.ascontiguousarray(x, accumulate_format(float_format("x", x)).name)
