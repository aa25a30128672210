"""The linear map on CuPy: a kernel for a few rows, cuBLAS on the weight itself, and CuPy."""

from __future__ import annotations

from llama_layers.arrays.dtypes import accumulate_format, dtype_of, float_format
from llama_layers.arrays.types import Namespace
from llama_layers.backends.cupy import cublas, launch
from llama_layers.backends.libraries import CupyArray
from llama_layers.backends.trust import takes

# cuBLAS multiplies numbers of one dtype only: a weight narrower than x is widened a block of rows
# at a time, into 64 MiB of float32 that each block takes in turn.
BLOCK_BYTES = 64 << 20


@takes(lambda xp, x, weight, bias: launch.takes_gemv(x, weight, x, bias))
def by_kernel(xp: Namespace, x: CupyArray, weight: CupyArray, bias: CupyArray | None) -> CupyArray:
    """``x @ weight.T + bias`` for a few rows x [M, K], weight [N, K], which is read once."""
    y = xp.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    launch.gemv(x, weight, y, bias=bias)
    return y


@takes(lambda xp, x, weight, bias: bool(x.size and weight.size) and cublas.available())
def by_cublas(xp: Namespace, x: CupyArray, weight: CupyArray, bias: CupyArray | None) -> CupyArray:
    """``x @ weight.T + bias`` by cuBLAS, without a copy of the weight.

    Sums are rounded once: a bias is in `total` before cuBLAS adds the products to it.
    """
    out = xp.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    sums = accumulate_format(float_format("x", x))
    wide = dtype_of(xp, sums.name)
    dtype = x.dtype if weight.dtype == x.dtype else wide
    held = bias is None or float_format("out", out).holds(float_format("bias", bias))
    total = out if out.dtype in (dtype, wide) and held else xp.empty(out.shape, dtype=wide)
    if bias is not None:
        total[...] = bias
    rows = weight.shape[0]
    if weight.dtype != dtype:
        rows = max(1, BLOCK_BYTES // (sums.itemsize * weight.shape[1]))
    x = cublas.readable(x.astype(dtype, copy=False))
    for start in range(0, weight.shape[0], rows):
        block = cublas.readable(weight[start : start + rows].astype(dtype, copy=False))
        part = total[:, start : start + rows]
        cublas.matmul(x, block.T, part, beta=0.0 if bias is None else 1.0)
    if total is not out:
        out[...] = total
    return out


@takes(lambda xp, x, weight, bias: bool(x.size and weight.size))
def by_cupy(xp: Namespace, x: CupyArray, weight: CupyArray, bias: CupyArray | None) -> CupyArray:
    """``x @ weight.T + bias`` by CuPy's own product of two dimensions, which sums in float32 too.

    It rounds a 16-bit product before the bias is added: once more, which the bound of a linear map
    allows. Operands of different dtypes are widened as a whole.
    """
    wide = dtype_of(xp, accumulate_format(float_format("x", x)).name)
    if weight.dtype == x.dtype:
        y = x @ weight.T
    else:
        y = x.astype(wide, copy=False) @ weight.astype(wide, copy=False).T
    if bias is not None:
        y = y.astype(wide, copy=False) + bias.astype(wide, copy=False)
    return y.astype(x.dtype, copy=False)
