"""The linear map on CuPy: one cuBLAS GEMM on the weight as it is stored."""

from __future__ import annotations

from typing import Any

from llama_layers.backends.dtypes import accumulate_format, dtype_of, float_format


def linear_2d(xp: Any, x: Any, weight: Any, bias: Any | None) -> Any:
    """``x @ weight.T + bias`` for x [M, K], weight [N, K].

    CuPy hands a 2-D product to cublasGemmEx, which reads ``weight.T`` through a transpose flag and
    sums 16-bit numbers in float32; an N-D product would copy the weight and fail for bfloat16.
    Operands of different dtypes are widened to the accumulate dtype first. With 16-bit x a bias is
    added to the rounded product: one rounding more, which the bound of a linear map allows.
    """
    if weight.dtype == x.dtype:
        y = x @ weight.T
    else:
        wide = dtype_of(xp, accumulate_format(float_format("x", x)).name)
        y = x.astype(wide, copy=False) @ weight.astype(wide, copy=False).T
    if bias is not None:
        wide = dtype_of(xp, accumulate_format(float_format("x", x)).name)
        y = y.astype(wide, copy=False) + bias.astype(wide, copy=False)
    return y.astype(x.dtype, copy=False)
