"""Narrow numbers and quantisation, as mistakes and correct variants use them."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def bfloat16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def float16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16).astype(np.float32)


def tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def fp8(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Rounded to float8 e4m3, with a scale for the whole or for each row."""
    scale = np.abs(x).max(axis, keepdims=axis is not None) / 448 + 1e-30
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def by_rows(x: np.ndarray, top: int) -> np.ndarray:
    """Rounded to whole multiples of a scale for each row."""
    scale = np.abs(x).max(-1, keepdims=True) / top + 1e-30
    return np.rint(x / scale) * scale


def by_blocks(x: np.ndarray, top: int, size: int) -> np.ndarray:
    """Rounded to whole multiples of a scale for each block of a row."""
    return over_blocks(x, size, lambda blocks: by_rows(blocks, top))


def over_blocks(x: np.ndarray, size: int, change) -> np.ndarray:
    """What a function of blocks, [..., blocks, size], makes of rows; the last block is padded."""
    width = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % size)])
    blocks = padded.reshape(*x.shape[:-1], -1, size)
    return change(blocks).reshape(padded.shape)[..., :width]
