"""Mistakes in RMSNorm."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.support.mistakes.mistake import (
    NORM,
    Mistake,
)
from tests.support.ported import narrow, normed


def _norm(eps=None, weight=None):
    def wrong(p):
        w = p.weight("input_layernorm")
        return normed(
            p["x"],
            w if weight is None else weight(p, w),
            p.config.rms_norm_eps if eps is None else eps,
        )

    return wrong


def _by(divisor, centre=False):
    def wrong(p):
        x = p["x"]
        if centre:
            x = x - x.mean(axis=-1, keepdims=True)
        return x / divisor(x, p.config.rms_norm_eps) * p.weight("input_layernorm")

    return wrong


def _square(x, axis=-1):
    return (x * x).mean(axis=axis, keepdims=True)


def _narrow_mean(dtype):
    def wrong(p):
        x = p["x"].astype(np.float32)
        total = np.zeros((*x.shape[:2], 1), dtype)
        for i in range(x.shape[-1]):
            total = (total.astype(np.float32) + x[..., i : i + 1] ** 2).astype(dtype)
        mean = narrow(total.astype(np.float32) / x.shape[-1], dtype)
        return x / np.sqrt(mean + np.float32(p.config.rms_norm_eps)) * p.weight(NORM)

    return wrong


MISTAKES = [
    Mistake("another eps", NORM, _norm(1e-5)),
    Mistake("another eps", NORM, _norm(1e-6)),
    Mistake("another eps", NORM, _norm(0.0)),
    Mistake("eps outside the root", NORM, _by(lambda x, eps: np.sqrt(_square(x)) + eps)),
    Mistake("norm weight plus one", NORM, _norm(weight=lambda p, w: w + 1)),
    Mistake("norm weight skipped", NORM, _norm(weight=lambda p, w: 1)),
    Mistake(
        "another norm's weight",
        NORM,
        _norm(weight=lambda p, w: p.weight("post_attention_layernorm")),
    ),
    Mistake("mean subtracted", NORM, _by(lambda x, eps: np.sqrt(_square(x) + eps), centre=True)),
    Mistake("sum instead of the mean", NORM, _by(lambda x, eps: np.sqrt(32 * _square(x) + eps))),
    Mistake("mean over one less", NORM, _by(lambda x, eps: np.sqrt(32 / 31 * _square(x) + eps))),
    Mistake("root forgotten", NORM, _by(lambda x, eps: _square(x) + eps)),
    Mistake(
        "normalised over several tokens",
        NORM,
        _by(lambda x, eps: np.sqrt(_square(x, (1, 2)) + eps)),
    ),
    Mistake("norm skipped", NORM, lambda p: p["x"]),
    Mistake("weight without the norm", NORM, lambda p: p["x"] * p.weight(NORM)),
    Mistake("norm's mean in bfloat16", NORM, _narrow_mean(ml_dtypes.bfloat16)),
    Mistake("norm's mean in float16", NORM, _narrow_mean(np.float16)),
    Mistake(
        "input from the wrong place",
        "post_attention_layernorm",
        lambda p: normed(p["x"], p.weight("post_attention_layernorm"), p.config.rms_norm_eps),
    ),
]
