"""The linear map on NumPy: OpenBLAS for float32 and float64, blocks for 16-bit weights."""

from __future__ import annotations

import numpy as np

from llama_layers.arrays.dtypes import accumulate_format, float_format
from llama_layers.arrays.types import Namespace

# 16-bit weights are widened a block of rows at a time: 4 MiB of float32 stay in the last-level
# cache between the widening and the product, and the whole matrix never exists twice.
BLOCK_BYTES = 4 << 20


def linear_2d(
    xp: Namespace, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None
) -> np.ndarray:
    """``x @ weight.T + bias`` for x [M, K], weight [N, K], as ``(weight @ x.T).T``.

    OpenBLAS takes up to 1.7 times as long for ``x @ weight.T`` (docs/cpu.md has the table).
    """
    wide: np.dtype = np.dtype(accumulate_format(float_format("x", x)).name)
    xt = x.astype(wide, copy=False).T
    if weight.dtype == wide:
        yt = weight @ xt
    else:
        yt = np.empty((weight.shape[0], x.shape[0]), wide)
        rows = max(1, BLOCK_BYTES // (wide.itemsize * max(1, weight.shape[1])))
        for start in range(0, weight.shape[0], rows):
            widened = weight[start : start + rows].astype(wide)
            np.matmul(widened, xt, out=yt[start : start + rows])
    if bias is not None:
        yt += bias.astype(wide, copy=False)[:, None]
    return yt.T.astype(x.dtype, copy=False)
