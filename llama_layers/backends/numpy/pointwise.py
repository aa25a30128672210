"""Norm, RoPE and the gate on NumPy, without temporary arrays that leave the cache."""

from __future__ import annotations

import numpy as np

from llama_layers.arrays.dtypes import accumulate_format, float_format
from llama_layers.arrays.types import Namespace

# Numbers that are gated at a time: four float32 arrays of them take 512 KiB and stay in a core's
# second-level cache.
BLOCK = 1 << 15


def normalise(xp: Namespace, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x * x) + eps) * weight`` over the last axis, in two arrays."""
    wide: np.dtype = np.dtype(accumulate_format(float_format("x", x)).name)
    wide_x = x.astype(wide, copy=False)
    y = np.square(wide_x)
    root = y.mean(axis=-1, keepdims=True)
    root += eps
    np.sqrt(root, out=root)
    np.divide(wide_x, root, out=y)
    y *= weight.astype(wide, copy=False)
    return y.astype(x.dtype, copy=False)


def rotate(
    xp: Namespace, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, layout: str
) -> np.ndarray:
    """RoPE in two arrays, both in the memory order of x."""
    wide_x = x.astype(cos.dtype, copy=False)
    if x.strides[1] < x.strides[3]:  # tokens stand one beside another; let the angles, too
        cos, sin = (np.asarray(angles, order="F") for angles in (cos, sin))
    cos, sin = (angles[..., None, :] for angles in (cos, sin))  # the same for each head
    y = np.empty_like(wide_x)
    half = x.shape[3] // 2
    places = (np.s_[:half], np.s_[half:]) if layout == "half" else (np.s_[0::2], np.s_[1::2])
    (a, b), (rotated_a, rotated_b) = ([z[..., place] for place in places] for z in (wide_x, y))
    np.multiply(a, cos, out=rotated_a)
    rotated_a -= b * sin
    np.multiply(b, cos, out=rotated_b)
    rotated_b += a * sin
    return y.astype(x.dtype, copy=False)


def gate_with_silu(xp: Namespace, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """``gate / (1 + exp(-gate)) * up``, a block at a time in the order of gate's memory."""
    wide: np.dtype = np.dtype(accumulate_format(float_format("gate", gate)).name)
    axes = sorted(range(gate.ndim), key=lambda axis: -abs(gate.strides[axis]))
    gate, up = gate.transpose(axes), up.transpose(axes)
    y = np.empty(gate.shape, gate.dtype)
    flat_gate, flat_up, flat_y = (array.reshape(-1) for array in (gate, up, y))
    decay, numerator = np.empty((2, min(BLOCK, gate.size)), wide)
    for start in range(0, gate.size, BLOCK):
        g = flat_gate[start : start + BLOCK].astype(wide, copy=False)
        d, n = decay[: g.size], numerator[: g.size]
        # e^-|g| never overflows; for a negative gate 1 / (1 + e^-g) is e^g / (1 + e^g).
        np.abs(g, out=d)
        np.negative(d, out=d)
        np.exp(d, out=d)
        np.greater_equal(g, 0, out=n)
        np.maximum(n, d, out=n)  # 1 for g >= 0, since d <= 1; faster than a choice
        d += 1
        n /= d
        n *= g
        n *= flat_up[start : start + BLOCK].astype(wide, copy=False)
        flat_y[start : start + BLOCK] = n
    return y.transpose([axes.index(axis) for axis in range(y.ndim)])
