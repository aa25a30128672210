"""Products of a few tokens with every row of a matrix, in compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.dtypes import dtype_name
from llama_layers.backends.numpy.fast.formats import FLOAT32, KINDS, MOST, ROWS
from llama_layers.backends.numpy.fast.team import TEAM, threads
from llama_layers.backends.numpy.linear import linear_2d as blas

LONELY = 1 << 16  # numbers of a matrix that one thread multiplies sooner than a second wakes
# Float32 numbers that BLAS multiplies within a millisecond: not worth loading numba for.
SMALL = 1 << 22


def linear_2d(
    xp: Any, x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any] | None
) -> NDArray[Any]:
    """``x @ weight.T + bias`` for x [M, K], weight [N, K]: each weight is read once."""
    kind = KINDS.get(dtype_name(weight.dtype))
    if (
        kind is None
        or x.dtype == np.float64
        or not 0 < len(x) <= MOST
        or len(weight) < ROWS
        or not weight.flags.c_contiguous
        or (kind == FLOAT32 and weight.size < SMALL)
    ):
        return blas(xp, x, weight, bias)
    from llama_layers.backends.numpy.fast import kernels  # loads numba, which takes a while

    rows = np.ascontiguousarray(x, np.float32)
    y = np.empty((len(x), len(weight)), np.float32)
    size = threads() if weight.size > LONELY else 1
    TEAM.run(size, kernels.product, kind, weight.ctypes.data, len(weight), rows, y)
    if bias is not None:
        y += bias.astype(np.float32, copy=False)
    return y.astype(x.dtype, copy=False)
