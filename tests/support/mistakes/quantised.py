"""Mistakes in few bits, in a batch and with dropout."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.support.mistakes.mistake import (
    ACT,
    ATTENTION,
    DOWN,
    EMBEDDING,
    NORM,
    RESIDUAL,
    UP,
    Mistake,
    Q,
)
from tests.support.ported import narrow


def _int8(x, axis):
    """Steps of the largest magnitude over 127, rounded one by one."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)
    return np.round(x / scale).astype(np.int8) * scale


def _by_block(x, size, how):
    return how(x.reshape(-1, size), -1).reshape(x.shape)


def _q8_0(x, axis):
    scale = (np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)).astype(np.float16)
    return np.round(x / scale.astype(np.float32)) * scale.astype(np.float32)


def _affine4(x, axis):
    low, high = (np.asarray(f(axis=axis, keepdims=True)) for f in (x.min, x.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / np.float32(15)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 15) - zero) * scale


def _e4m3(x, axis):
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(448)
    return narrow(x / scale, ml_dtypes.float8_e4m3fn) * scale


def _e5m2(x):
    return narrow(x, ml_dtypes.float8_e5m2)


def _same(x):
    return x


def _product(role, source, inputs=_same, weights=_same):
    return lambda p: inputs(p[source]).astype(np.float64) @ weights(p.weight(role)).T + p.own_bias


def _cached(keys, values):
    def wrong(p):
        q, k, v = p.qkv
        return p.attended(q, keys(k), values(v))

    return wrong


def _pruned(w):
    """The two smaller of each four are zero."""
    few = w.reshape(-1, 4).copy()
    for row in few:
        row[np.argsort(np.abs(row))[:2]] = 0
    return few.reshape(w.shape)


def _smallest_gone(w):
    """A quarter of each row is zero."""
    few = w.copy()
    for row in few:
        row[np.argsort(np.abs(row))[: len(row) // 4]] = 0
    return few


def _dropped(array, share):
    kept = np.random.default_rng(3).random(array.shape) >= share
    return np.where(kept, array / np.float32(1 - share), 0)


def _first_sequence_twice(p):
    return np.stack([p.right[0], p.right[0]])


_BOTH = "weights and inputs quantised"
MISTAKES = [
    Mistake("weights quantised", Q, _product(Q, NORM, weights=lambda w: _int8(w, -1))),
    Mistake("weights quantised", UP, _product(UP, "post_attention_layernorm", weights=_e5m2)),
    Mistake("weights quantised", Q, _product(Q, NORM, weights=lambda w: _e4m3(w, None))),
    Mistake("weights quantised", Q, _product(Q, NORM, weights=lambda w: _by_block(w, 16, _q8_0))),
    Mistake(
        "weights quantised", DOWN, _product(DOWN, ACT, weights=lambda w: _by_block(w, 16, _affine4))
    ),
    Mistake("inputs quantised", Q, _product(Q, NORM, inputs=lambda x: _int8(x, -1))),
    Mistake("inputs quantised", DOWN, _product(DOWN, ACT, inputs=lambda x: _e4m3(x, None))),
    Mistake(
        _BOTH,
        Q,
        _product(Q, NORM, inputs=lambda x: _int8(x, -1), weights=lambda w: _int8(w, -1)),
    ),
    Mistake("weights pruned", Q, _product(Q, NORM, weights=_pruned)),
    Mistake(
        "weights pruned",
        Q,
        _product(
            Q, NORM, weights=lambda w: np.where(np.abs(w) < np.quantile(np.abs(w), 0.3), 0, w)
        ),
    ),
    Mistake("weights pruned", DOWN, _product(DOWN, ACT, weights=_smallest_gone)),
    Mistake(
        "embedding quantised",
        EMBEDDING,
        lambda p: p.rows(p.ids, _int8(p.weights["model.embed_tokens.weight"], -1)),
    ),
    Mistake("cache quantised", ATTENTION, _cached(lambda k: _int8(k, -1), lambda v: _int8(v, -1))),
    Mistake("cache quantised", ATTENTION, _cached(_e5m2, _e5m2)),
    Mistake("cache quantised", ATTENTION, _cached(_same, lambda v: _e4m3(v, (0, 1, 2, 3)))),
    Mistake("dropout", ACT, lambda p: _dropped(p.right, 0.1)),
    Mistake("dropout", RESIDUAL, lambda p: p["x"] + _dropped(p.added, 0.25)),
    Mistake("sequences of the batch repeated", NORM, _first_sequence_twice),
    Mistake("sequences in another order", NORM, lambda p: p.right[::-1]),
]
