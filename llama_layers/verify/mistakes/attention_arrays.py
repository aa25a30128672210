"""Scores, weights and values in float64, for what is read off a port's own attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import wide
from llama_layers.verify.operations import Attention
from llama_layers.verify.roundoff import Float64Array


def scores_of(attention: Attention) -> Float64Array:
    """The scores [B, heads, S, T]."""
    q, k = (wide(y).transpose(0, 2, 1, 3) for y in (attention.q, attention.k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.asarray(q @ k.swapaxes(-1, -2) * attention.scale)


def values_of(attention: Attention) -> Float64Array:
    """The values of each query head, [B, heads, T, D]."""
    v = wide(attention.v).transpose(0, 2, 1, 3)
    return np.repeat(v, attention.q.shape[2] // v.shape[1], axis=1)


def softmax(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    """The softmax over the keys that are allowed; zeros where none is."""
    hidden = np.where(allowed, scores, -np.inf)
    largest = hidden.max(axis=-1, keepdims=True)
    weights = np.exp(hidden - np.where(np.isfinite(largest), largest, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / np.where(total == 0, 1.0, total))
