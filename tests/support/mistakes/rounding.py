"""Mistakes in rounding."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.support.mistakes.mistake import (
    EMBEDDING,
    NORM,
    Mistake,
    Q,
)
from tests.support.ported import narrow, normed


def _tf32(x, nearest=True):
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(4096 if nearest else 0)) & np.uint32(0xFFFFE000)).view(np.float32)


def _rounded(how):
    return lambda p: how(p[NORM]).astype(np.float64) @ how(p.weight(Q)).T + p.own_bias


def _of_weights(how):
    return lambda p: p[NORM].astype(np.float64) @ how(p.weight(Q)).T + p.own_bias


def _norm_of_narrow_weight(p):
    weight = narrow(p.weight(p.role), np.float16) + p.config.norm_weight_offset
    return normed(p.read, weight, p.config.rms_norm_eps)


def _table(p):
    return p.weights["model.embed_tokens.weight"]


def _sums(dtype):
    def wrong(p):
        x, w = p["input_layernorm"], p.weight(Q)
        total = narrow(np.zeros((*x.shape[:2], len(w)), np.float32) + p.own_bias, dtype)
        for i in range(x.shape[-1]):
            total = narrow(total + narrow(x[..., i, None] * w[:, i], dtype), dtype)
        return total

    return wrong


MISTAKES = [
    Mistake("inputs rounded to TF32", Q, _rounded(_tf32), also=("inputs rounded to float16",)),
    Mistake("inputs rounded to TF32", Q, _rounded(lambda x: _tf32(x, False))),
    Mistake("inputs rounded to bfloat16", Q, _rounded(narrow)),
    Mistake("inputs rounded to float16", Q, _rounded(lambda x: narrow(x, np.float16)), "small"),
    Mistake("weights rounded to bfloat16", Q, _of_weights(narrow)),
    Mistake("weights rounded to float16", NORM, _norm_of_narrow_weight),
    Mistake(
        "weights rounded to bfloat16",
        EMBEDDING,
        lambda p: p.rows(p.ids, narrow(_table(p))),
        also=("result rounded to bfloat16",),
    ),
    Mistake("result rounded to bfloat16", Q, lambda p: narrow(p.right)),
    Mistake("result rounded to float16", Q, lambda p: narrow(p.right, np.float16)),
    Mistake("sums kept in bfloat16", Q, _sums(ml_dtypes.bfloat16)),
    Mistake("sums kept in float16", Q, _sums(np.float16)),
]
