"""Mistakes in the switches of families: multipliers, caps, activations, norms of heads."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from tests.support.mistakes.mistake import (
    ACT,
    ATTENTION,
    EMBEDDING,
    GATE,
    NORM,
    PLACES,
    Q_ROPE,
    RESIDUAL,
    UP,
    Mistake,
)
from tests.support.ported import normed

_erf = np.vectorize(math.erf)
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"


def _embedding(factor):
    """The rows of the table, times another factor."""

    def wrong(p):
        table = p.weights[f"{EMBEDDING}.weight"].astype(np.float64)
        return table[p.ids] * factor(p.config.embedding_multiplier)

    return wrong


def _sum(combine):
    """A residual stream of x, of what a block computes and of the multiplier."""

    def wrong(p):
        x = p["x"] if p.role == RESIDUAL else p["attention_residual"]
        return combine(x, p.block, p.times)

    return wrong


def _logits(change):
    """What is made of what the head gives, its scaling and its cap."""

    def wrong(p):
        by, cap = p.config.logits_scaling, p.config.final_logit_softcapping
        by = 1 / by if p.config.model_type == "hyperclovax" else by
        return change(p.arrays["lm_head"].astype(np.float64), by, cap)

    return wrong


def _capped(y, cap):
    return cap * np.tanh(y / cap)


def _written_as_head(p):
    y, by = p.right, p.config.logits_scaling
    y = y * by if p.config.model_type == "hyperclovax" else y / by
    cap = p.config.final_logit_softcapping
    return y if cap is None else _capped(y, cap)


def _scores(**how):
    return lambda p: p.attended(*p.qkv, **{name: value(p) for name, value in how.items()})


def _gate(formula):
    return lambda p: formula(p[GATE].astype(np.float64)) * p[UP]


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _warmed(places):
    """Queries with the temperature of other positions."""

    def wrong(p):
        trained = p.config.rope_scaling.original_max_position_embeddings
        other = 1 + p.config.llama_4_scaling_beta * np.log(1 + places(PLACES, trained))
        return p.right / p.warmth[:, None, None] * other[:, None, None]

    return wrong


def _divided(p):
    return 1 / p.scale


def _head_dim(p):
    return p.config.head_dim**-0.5


MULTIPLIERS = [
    Mistake("embedding not multiplied", EMBEDDING, _embedding(lambda m: 1.0), "multipliers"),
    Mistake("another embedding multiplier", EMBEDDING, _embedding(lambda m: 1 / m), "multipliers"),
    Mistake("another embedding multiplier", EMBEDDING, _embedding(lambda m: m * m), "multipliers"),
    Mistake(
        "embedding multiplier rounded otherwise",
        EMBEDDING,
        _embedding(lambda m: float(ml_dtypes.bfloat16(m))),
        "gemma",
    ),
    *(
        mistake
        for role in (RESIDUAL, "")
        for mistake in (
            Mistake(
                "residual multiplier left out", role, _sum(lambda x, y, by: x + y), "multipliers"
            ),
            Mistake(
                "residual multiplier divides",
                role,
                _sum(lambda x, y, by: x + y / by),
                "multipliers",
            ),
        )
    ),
    Mistake(
        "residual multiplier in the wrong place",
        RESIDUAL,
        _sum(lambda x, y, by: by * x + y),
        "multipliers",
    ),
    Mistake(
        "residual multiplier in the wrong place",
        "",
        _sum(lambda x, y, by: by * (x + y)),
        "multipliers",
    ),
    Mistake(
        "logits scaling multiplies", "logits", _logits(lambda y, by, cap: y * by), "multipliers"
    ),
    Mistake("logits not scaled", "logits", _logits(lambda y, by, cap: y), "multipliers"),
    Mistake("logits for what the head gives", "lm_head", _written_as_head, "logits"),
    Mistake("another scale of scores", ATTENTION, _scores(scale=_head_dim), "multipliers"),
    Mistake("scores scaled", ATTENTION, _scores(scale=_divided), "multipliers"),
]
GEMMA = [
    *(
        Mistake(
            "norm weight without its plus one",
            role,
            lambda p: normed(p.read, p.weight(p.role), p.config.rms_norm_eps),
            "gemma",
        )
        for role in (NORM, "post_attention_layernorm")
    ),
    Mistake("cap of scores missing", ATTENTION, _scores(cap=lambda p: None), "cap of scores"),
    Mistake(
        "cap of scores before the scale",
        ATTENTION,
        _scores(cap=lambda p: p.config.attn_logit_softcapping * p.scale),
        "cap of scores",
    ),
    Mistake("cap of logits missing", "logits", _logits(lambda y, by, cap: y / by), "cap of logits"),
    Mistake(
        "another cap of logits",
        "logits",
        _logits(lambda y, by, cap: _capped(y, 30)),
        "cap of logits",
    ),
    Mistake(
        "another cap of logits",
        "logits",
        _logits(lambda y, by, cap: np.clip(y / by, -cap, cap)),
        "cap of logits",
    ),
    Mistake("silu for gelu", ACT, _gate(lambda g: g * _sigmoid(g)), "gelu"),
    Mistake("gelu with erf for gelu", ACT, _gate(lambda g: g / 2 * (1 + _erf(g / 2**0.5))), "gelu"),
    Mistake("gelu with sigmoid for gelu", ACT, _gate(lambda g: g * _sigmoid(1.702 * g)), "gelu"),
]


def _one_head_scaled(p):
    y = p.right.copy()
    y[:, :, 1] *= np.float32(1.1)
    return y


HEADS = [
    *(
        mistake
        for role, other in ((Q_NORM, K_NORM), (K_NORM, Q_NORM))
        for mistake in (
            Mistake("norm skipped", role, lambda p: p.read, "norms of heads"),
            Mistake(
                "norm weight skipped",
                role,
                lambda p: normed(p.split(p.read), 1, p.config.rms_norm_eps),
                "norms of heads",
            ),
            Mistake(
                "another norm's weight",
                role,
                lambda p, other=other: normed(
                    p.split(p.read), p.gain(other), p.config.rms_norm_eps
                ),
                "norms of heads",
            ),
            Mistake(
                "another layer's weights",
                role,
                lambda p, role=role: normed(
                    p.split(p.read), p.gain(role, 2), p.config.rms_norm_eps
                ),
                "norms of heads",
            ),
            Mistake(
                "norm weight in another order",
                role,
                lambda p, role=role: normed(
                    p.split(p.read), p.gain(role)[[0, 2, 4, 6, 1, 3, 5, 7]], p.config.rms_norm_eps
                ),
                "norms of heads",
            ),
            Mistake("a head scaled", role, _one_head_scaled, "norms of heads"),
        )
    ),
    Mistake(
        "query temperature of other positions",
        Q_ROPE,
        _warmed(lambda at, n: (at + 1) // n),
        "temperature",
    ),
    Mistake(
        "query temperature of other positions", Q_ROPE, _warmed(lambda at, n: at / n), "temperature"
    ),
    Mistake(
        "query temperature of another beta",
        Q_ROPE,
        lambda p: p.right * ((1 + 0.3 * (p.warmth - 1)) / p.warmth)[:, None, None],
        "temperature",
    ),
]
MISTAKES = [*MULTIPLIERS, *GEMMA, *HEADS]
