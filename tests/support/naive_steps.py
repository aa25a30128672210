"""Steps of a model in naive code, for ports with mistakes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np


def omega(config, theta=None):
    """Plain frequencies."""
    half = config.head_dim // 2
    theta = config.rope_theta if theta is None else theta
    return np.array([theta ** (-2 * i / config.head_dim) for i in range(half)])


def turned(
    x,
    phases,
    layout="half",
    factor=1.0,
    sign=1,
    rounding=lambda numbers: numbers,
    table=(np.cos, np.sin),
):
    """x [B, S, heads, D] turned by phases [S, n], pair by pair of its first 2 n channels."""
    x = x.astype(np.float64)
    y = x.copy()
    half = phases.shape[1]
    for i in range(half):
        a, b = (i, i + half) if layout == "half" else (2 * i, 2 * i + 1)
        cos, sin = (rounding(factor * f(phases[:, i])[None, :, None]) for f in table)
        sin = sign * sin
        y[..., a] = x[..., a] * cos - x[..., b] * sin
        y[..., b] = x[..., a] * sin + x[..., b] * cos
    return y


def causal(count, window=None):
    query, key = np.mgrid[:count, :count]
    return (key <= query) & (key > query - (window or count))


def attended(
    q, k, v, allowed, scale=None, hidden=-np.inf, kv_of=None, weights=None, cap=None, sinks=None
):
    """Attention one head at a time; `weights` may make other weights of the scores.

    `sinks` join the scores of their heads as those of one more key, of which the value is zero.
    """
    heads, groups = q.shape[2], k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    allowed = np.broadcast_to(allowed, (len(q), q.shape[1], k.shape[1]))
    y = np.zeros(q.shape)
    for h in range(heads):
        kv = h * groups // heads if kv_of is None else kv_of(h)
        scores = np.einsum("bsd,btd->bst", q[:, :, h], k[:, :, kv]).astype(np.float64) * scale
        if cap is not None:
            scores = cap * np.tanh(scores / cap)
        scores = np.where(allowed, scores, hidden)
        if sinks is not None:
            scores = np.pad(scores, ((0, 0), (0, 0), (0, 1)), constant_values=sinks[h])
        p = (softmax if weights is None else weights)(scores)[..., : k.shape[1]]
        y[:, :, h] = np.einsum("bst,btd->bsd", p, v[:, :, kv])
    return y


def softmax(scores):
    largest = scores.max(axis=-1, keepdims=True)
    e = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    return e / np.maximum(e.sum(axis=-1, keepdims=True), 1e-300)


def normed(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x.astype(np.float64)))


def gelu(x):
    x = x.astype(np.float64)
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def narrow(array, dtype=ml_dtypes.bfloat16):
    return array.astype(dtype).astype(np.float32)
