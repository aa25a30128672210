"""Scores, weights and values in float64, for what is read off a port's own attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import wide
from llama_layers.verify.operations import Attention
from llama_layers.verify.roundoff import Float64Array


def scores_of(attention: Attention) -> Float64Array:
    """The scores [B, heads, S, T], capped where the model caps them."""
    return capped(uncapped_scores(attention), attention.cap)


def uncapped_scores(attention: Attention) -> Float64Array:
    """The scores [B, heads, S, T] before they are capped."""
    q, k = (wide(y).transpose(0, 2, 1, 3) for y in (attention.q, attention.k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.asarray(q @ k.swapaxes(-1, -2) * attention.scale)


def capped(scores: Float64Array, cap: float | None) -> Float64Array:
    """Scores s as cap tanh(s / cap); as they are without a cap."""
    return scores if cap is None else np.asarray(cap * np.tanh(scores / cap))


def sinks_of(attention: Attention) -> Float64Array:
    """The sink of each query head, [heads, 1, 1]; minus infinity where the model has none."""
    heads = attention.q.shape[2]
    sinks = np.full(heads, -np.inf) if attention.sinks is None else wide(attention.sinks)
    return sinks[:, None, None]


def values_of(attention: Attention) -> Float64Array:
    """The values of each query head, [B, heads, T, D]."""
    v = wide(attention.v).transpose(0, 2, 1, 3)
    return np.repeat(v, attention.q.shape[2] // v.shape[1], axis=1)


def softmax(
    scores: Float64Array, allowed: NDArray[np.bool_], sinks: Float64Array | float = -np.inf
) -> Float64Array:
    """The softmax over the keys that are allowed and a sink; zeros where none is."""
    hidden = np.where(allowed, scores, -np.inf)
    largest = np.maximum(hidden.max(axis=-1, keepdims=True), sinks)
    largest = np.where(np.isfinite(largest), largest, 0)
    weights = np.exp(hidden - largest)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks - largest)
    return np.asarray(weights / np.where(total == 0, 1.0, total))
