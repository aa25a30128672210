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
        w = p.gain()
        return normed(
            p.read,
            w if weight is None else weight(p, w),
            p.config.rms_norm_eps if eps is None else eps,
        )

    return wrong


def _by(divisor, centre=False):
    def wrong(p):
        x = p.read
        if centre:
            x = x - x.mean(axis=-1, keepdims=True)
        return x / divisor(x, p.config.rms_norm_eps) * p.gain()

    return wrong


def _square(x, axis=-1):
    return (x * x).mean(axis=axis, keepdims=True)


def _narrow_mean(dtype):
    def wrong(p):
        x = p.read.astype(np.float32)
        total = np.zeros((*x.shape[:2], 1), dtype)
        for i in range(x.shape[-1]):
            total = (total.astype(np.float32) + x[..., i : i + 1] ** 2).astype(dtype)
        mean = narrow(total.astype(np.float32) / x.shape[-1], dtype)
        return x / np.sqrt(mean + np.float32(p.config.rms_norm_eps)) * p.gain()

    return wrong


AFTER_ATTENTION, AFTER_MLP = "post_self_attn_layernorm", "post_mlp_layernorm"
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"


def _of_the_sum(role, stream, added):
    return lambda p: normed(p[stream] + p[added], p.gain(role), p.config.rms_norm_eps)


def _input_normalised(role, norm):
    def wrong(p):
        x = normed(p["x"], p.gain(norm), p.config.rms_norm_eps)
        return x @ p.weight(role).T + p.own_bias

    return wrong


def _of_all_heads(p):
    x = p.split(p.read)
    size = np.sqrt((x * x).mean(axis=(2, 3), keepdims=True) + p.config.rms_norm_eps)
    return x / size * p.gain()


def _of_each_head(p):
    x = p.split(p.read)
    size = np.sqrt((x * x).mean(axis=-1, keepdims=True) + p.config.rms_norm_eps)
    return (x / size).reshape(*x.shape[:2], -1) * p.gain()


def _after_rope(p):
    x = p.turned(p.split(p.read)).reshape(p.right.shape)
    return normed(x, p.gain(), p.config.rms_norm_eps)


def _before_rope(p):
    return p.turned(normed(p.split(p.read), p.gain(K_NORM), p.config.rms_norm_eps))


PLACED = [
    Mistake(
        "norm of the sum",
        AFTER_ATTENTION,
        _of_the_sum(AFTER_ATTENTION, "x", "self_attn.o_proj"),
        "norms on both sides",
    ),
    Mistake(
        "norm of the sum",
        AFTER_MLP,
        _of_the_sum(AFTER_MLP, "attention_residual", "mlp.down_proj"),
        "norms after",
    ),
    Mistake("norm skipped", AFTER_MLP, lambda p: p["mlp.down_proj"], "norms after"),
    Mistake(
        "another norm's weight",
        AFTER_ATTENTION,
        lambda p: normed(
            p["self_attn.o_proj"], p.gain("post_attention_layernorm"), p.config.rms_norm_eps
        ),
        "norms on both sides",
    ),
    Mistake(
        "norm skipped",
        "attention_residual",
        lambda p: p["x"] + p.times * p["self_attn.o_proj"],
        "norms after",
    ),
    Mistake(
        "norm weight plus one in bfloat16",
        NORM,
        lambda p: normed(p.read, narrow(p.gain(), ml_dtypes.bfloat16), p.config.rms_norm_eps),
        "gemma",
    ),
    Mistake(
        "input normalised",
        "self_attn.q_proj",
        _input_normalised("self_attn.q_proj", AFTER_ATTENTION),
        "norms after",
    ),
    Mistake(
        "norm over the wrong width",
        Q_NORM,
        _of_all_heads,
        "norms of heads",
    ),
    Mistake(
        "norm over the wrong width",
        K_NORM,
        _of_all_heads,
        "norms after RoPE",
    ),
    Mistake(
        "normalised over a share of the channels", Q_NORM, _of_each_head, "norms of projections"
    ),
    Mistake("norm after RoPE", Q_NORM, _after_rope, "norms of heads"),
    Mistake("norm before RoPE", "self_attn.k_rope", _before_rope, "norms after RoPE"),
]

MISTAKES = [
    *PLACED,
    Mistake("another eps", NORM, _norm(1e-5)),
    Mistake("another eps", NORM, _norm(1e-6)),
    Mistake("another eps", NORM, _norm(0.0)),
    Mistake("eps outside the root", NORM, _by(lambda x, eps: np.sqrt(_square(x)) + eps)),
    Mistake("norm weight plus one", NORM, _norm(weight=lambda p, w: w + 1)),
    Mistake("norm weight skipped", NORM, _norm(weight=lambda p, w: 1)),
    Mistake(
        "another norm's weight",
        NORM,
        _norm(weight=lambda p, w: p.gain(p.another_norm)),
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
    Mistake("norm skipped", NORM, lambda p: p.read),
    Mistake("weight without the norm", NORM, lambda p: p.read * p.gain()),
    Mistake("norm's mean in bfloat16", NORM, _narrow_mean(ml_dtypes.bfloat16)),
    Mistake("norm's mean in float16", NORM, _narrow_mean(np.float16)),
    Mistake(
        "input from the wrong place",
        "post_attention_layernorm",
        lambda p: normed(p["x"], p.gain(), p.config.rms_norm_eps),
    ),
]
