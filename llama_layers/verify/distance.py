"""How far apart two arrays are, as a whole."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Numbers of an array that are widened to float64 at a time.
_BLOCK = 2**20


def distance(a: np.ndarray, b: np.ndarray, allowed: NDArray[np.bool_] | None = None) -> float:
    """||a - b|| / ||a|| over what is allowed, a block at a time."""
    error = norm = 0.0
    step = max(1, _BLOCK // max(1, a[:1].size))
    for start in range(0, len(a), step):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            x, y = (array[start : start + step].astype(np.float64) for array in (a, b))
        if allowed is not None:
            x, y = (np.where(allowed[start : start + step], array, 0.0) for array in (x, y))
        finite = np.isfinite(x) & np.isfinite(y)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
            return math.inf
        with np.errstate(over="ignore"):
            error += float(np.sum(np.square(x[finite] - y[finite])))
            norm += float(np.sum(np.square(x[finite])))
    if error == 0:
        return 0.0
    return math.sqrt(error / norm) if norm and math.isfinite(error) else math.inf
