"""Mistakes in the residual stream, the embedding and the head."""

from __future__ import annotations

import numpy as np

from tests.support.mistakes.mistake import (
    EMBEDDING,
    NORM,
    RESIDUAL,
    Mistake,
    Q,
)
from tests.support.ported import normed

MISTAKES = [
    Mistake("residual missing", RESIDUAL, lambda p: p.added),
    Mistake("block not added", RESIDUAL, lambda p: p["x"]),
    Mistake("added twice", RESIDUAL, lambda p: p["x"] + 2 * p.added),
    Mistake("added twice", RESIDUAL, lambda p: p["x"] * 2 + p.added),
    Mistake("subtracted for added", RESIDUAL, lambda p: p["x"] - p.added),
    Mistake("residual from the wrong place", RESIDUAL, lambda p: p[NORM] + p.added),
    Mistake("another block added", RESIDUAL, lambda p: p["x"] + p.times * p[Q]),
    Mistake("one array more added", RESIDUAL, lambda p: p["x"] + p.added + p[Q]),
    Mistake("added block scaled", RESIDUAL, lambda p: p["x"] + np.float32(0.3) * p.added),
    Mistake("residual from the wrong place", "", lambda p: p["x"] + p.added),
]


def _table(p):
    return p.weights["model.embed_tokens.weight"]


def _probabilities(logits):
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(axis=-1, keepdims=True)


OUTSIDE = [
    Mistake(
        "embedding scaled by the root of hidden_size",
        EMBEDDING,
        lambda p: p.right * np.float32(32**0.5),
    ),
    Mistake("token ids shifted", EMBEDDING, lambda p: p.rows(p.ids - 1)),
    Mistake("tokens shifted", EMBEDDING, lambda p: p.rows(np.roll(p.ids, 1, axis=1))),
    Mistake(
        "another embedding table", EMBEDDING, lambda p: p.rows(p.ids, p.weights["lm_head.weight"])
    ),
    Mistake(
        "another embedding table", EMBEDDING, lambda p: p.rows(p.ids, _table(p).reshape(32, -1).T)
    ),
    Mistake("norm skipped", "model.norm", lambda p: p.arrays["model.layers.2"]),
    Mistake(
        "input from the wrong place",
        "model.norm",
        lambda p: normed(p.arrays["model.layers.1"], p.gain("model.norm"), p.config.rms_norm_eps),
    ),
    Mistake(
        "embedding used as the head", "lm_head", lambda p: p.arrays["model.norm"] @ _table(p).T
    ),
    Mistake(
        "input not normalised",
        "lm_head",
        lambda p: p.arrays["model.layers.2"] @ p.head.T,
    ),
    Mistake(
        "hidden state normalised already",
        "model.layers.2",
        lambda p: normed(p.right, p.gain("model.norm"), p.config.rms_norm_eps),
    ),
    Mistake("logits centred", "lm_head", lambda p: p.right - p.right.mean(-1, keepdims=True)),
    Mistake(
        "logits less their maximum", "lm_head", lambda p: p.right - p.right.max(-1, keepdims=True)
    ),
    Mistake("log-probabilities for logits", "lm_head", lambda p: np.log(_probabilities(p.right))),
    Mistake("probabilities for logits", "lm_head", lambda p: _probabilities(p.right)),
]
MISTAKES += OUTSIDE
