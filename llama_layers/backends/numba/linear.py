"""Products with every row of a matrix, in compiled code where that is faster than BLAS."""

from __future__ import annotations

import numpy as np

from llama_layers.arrays.dtypes import accumulate_format, dtype_name, float_format
from llama_layers.arrays.types import Namespace
from llama_layers.backends.numba import kernels
from llama_layers.backends.numba.array_pool import empty
from llama_layers.backends.numba.kernel_dtypes import FLOAT32, kernel_dtype, readable, ready
from llama_layers.backends.numba.sizes import MAX_DECODE_TOKENS, ROWS, small
from llama_layers.backends.numba.threadpool import THREADS, num_threads
from llama_layers.backends.trust import takes

ONE_THREAD = 1 << 16  # numbers of a matrix that one thread multiplies before a second wakes
# Float32 numbers that BLAS multiplies by a few tokens within a millisecond: not worth loading numba
# for.
SMALL = 1 << 22


def _multiplied(xp: Namespace, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> bool:
    """Whether a kernel multiplies them."""
    kind = readable(weight)
    if (
        kind is None
        or kernel_dtype(x.dtype) is None
        or len(x) == 0
        or len(weight) < ROWS
        or not weight.flags.c_contiguous
    ):
        return False
    if len(x) <= MAX_DECODE_TOKENS:
        return kind != FLOAT32 or not small(weight.size, SMALL)
    return kernels.gemm.problem(dtype_name(x.dtype), dtype_name(weight.dtype)) is None


@takes(_multiplied)
def linear_2d(
    xp: Namespace, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """``x @ weight.T + bias`` for x [M, K], weight [N, K]: each weight is read once."""
    size = num_threads() if weight.size > ONE_THREAD else 1
    multiply = _few if len(x) <= MAX_DECODE_TOKENS else _many
    return multiply(x, weight, bias, size)


def _few(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, size: int) -> np.ndarray:
    """Multiply a few tokens: the reading of the weights is the limit."""
    rows = ready(x, np.float32)
    y = np.empty((len(x), len(weight)), np.float32)
    product = kernels.decode.product
    THREADS.run(size, product, readable(weight), weight.ctypes.data, rows, y)
    if bias is not None:
        y += bias.astype(np.float32, copy=False)
    return y.astype(x.dtype, copy=False)


def _many(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, size: int) -> np.ndarray:
    """Multiply many tokens: arithmetic is the limit, and no weight is widened as a whole."""
    y = empty((len(x), len(weight)), x.dtype)
    wide = None if bias is None else bias.astype(np.float32, copy=False)
    product = kernels.gemm.product(x, weight, wide, y, size)
    sync = np.zeros(3, np.int64)
    THREADS.run(size, kernels.gemm.multiply, sync, product, stop=sync)
    return y


def _in_order(xp: Namespace, x: np.ndarray) -> bool:
    """Whether kernels will compute the products of this number of tokens."""
    if x.size <= MAX_DECODE_TOKENS * x.shape[-1]:
        return True
    return kernels.gemm.problem("float32", "float32") is None


@takes(_in_order)
def activations(xp: Namespace, x: np.ndarray) -> np.ndarray:
    """Embeddings widened to float32 at least, in the order of memory that products will have."""
    return np.ascontiguousarray(x, accumulate_format(float_format("x", x)).name)
