"""How far apart two arrays are, as a whole or token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.roundoff import Float64Array

# Numbers of an array that are widened to float64 at a time.
_BLOCK = 2**20


def distance(a: np.ndarray, b: np.ndarray, allowed: NDArray[np.bool_] | None = None) -> float:
    """||a - b|| / ||a||, a block at a time, of what is allowed."""
    error, norm = (float(np.sum(squares)) for squares in _squares(a, b, allowed))
    return _root(error, norm)


def distance_by_token(
    a: np.ndarray, b: np.ndarray, allowed: NDArray[np.bool_] | None = None
) -> float:
    """The root mean square of ||a - b|| / ||a|| over the first axis, of what is allowed.

    So a token counts as much as another whose activations are larger. Where `a` is zero, its
    average over the others is taken for it.
    """
    error, norm = _squares(a, b, allowed)
    if not (norm.any() and np.isfinite(error).all()):
        return _root(float(np.sum(error)), 0.0)
    relative = error / np.where(norm > 0, norm, np.mean(norm))
    return _root(float(np.sum(relative)), float(len(relative)))


def _root(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return math.sqrt(error / norm) if norm and math.isfinite(error) else math.inf


def _squares(
    a: np.ndarray, b: np.ndarray, allowed: NDArray[np.bool_] | None
) -> tuple[Float64Array, Float64Array]:
    """The squares of ||a - b|| and ||a|| in each row; the first is infinite if one is not finite.

    Numbers that are not finite do not count where both have the same.
    """
    blocks = list(_blocks(a, b, allowed))
    error, norm = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return error, norm


def _blocks(
    a: np.ndarray, b: np.ndarray, allowed: NDArray[np.bool_] | None
) -> Iterator[tuple[Float64Array, Float64Array]]:
    step = max(1, _BLOCK // max(1, a[:1].size))
    for start in range(0, len(a), step):
        with np.errstate(invalid="ignore"):  # a signalling NaN
            x, y = (array[start : start + step].astype(np.float64) for array in (a, b))
        if allowed is not None:
            x, y = (np.where(allowed[start : start + step], array, 0.0) for array in (x, y))
        finite = np.isfinite(x) & np.isfinite(y)
        same = finite | (x == y) | (np.isnan(x) & np.isnan(y))
        x, y = (np.where(finite, array, 0.0) for array in (x, y))
        rows = tuple(range(1, x.ndim))
        with np.errstate(over="ignore"):
            error, norm = (np.sum(np.square(array), axis=rows) for array in (x - y, x))
        yield np.where(same.all(axis=rows), error, np.inf), norm
