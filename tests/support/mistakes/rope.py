"""Mistakes in RoPE."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np

from tests.support.decoder_oracle import frequencies
from tests.support.mistakes.mistake import (
    PLACES,
    Q_ROPE,
    Mistake,
)
from tests.support.ported import COUNT, narrow, omega, turned


def _rope(role, **how):
    def wrong(p):
        phases = how.get("phases", lambda config: np.outer(PLACES, omega(config)))(p.config)
        options = {k: v for k, v in how.items() if k in ("layout", "factor", "sign")}
        return turned(p.heads(role), phases, **options)

    return wrong


def _theta(theta):
    return _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c, theta)))


def _at(places):
    return _rope("self_attn.q_proj", phases=lambda c: np.outer(places, omega(c)))


def _put_back(p):
    x = p.heads("self_attn.q_proj").astype(np.float64)
    a, b = x[..., 0::2], x[..., 1::2]
    phases = np.outer(PLACES, omega(p.config))[None, :, None]
    parts = [a * np.cos(phases) - b * np.sin(phases), b * np.cos(phases) + a * np.sin(phases)]
    return np.concatenate(parts, axis=-1)


def _cos_sin(p):
    x = p.heads("self_attn.q_proj").astype(np.float64)
    a, b = np.split(x, 2, axis=-1)
    phases = np.outer(PLACES, omega(p.config))[None, :, None]
    parts = [a * np.sin(phases) - b * np.cos(phases), b * np.sin(phases) + a * np.cos(phases)]
    return np.concatenate(parts, axis=-1)


def _one_half(p):
    right, x = p.right.copy(), p.heads("self_attn.q_proj")
    right[..., x.shape[-1] // 2 :] = x[..., x.shape[-1] // 2 :]
    return right


def _partial(p):
    x, half = p.heads("self_attn.q_proj"), p.config.head_dim // 2
    small = [p.config.rope_theta ** (-2 * i / half) for i in range(half // 2)]
    first = turned(x[..., :half], np.outer(PLACES, small))
    return np.concatenate([first, x[..., half:]], axis=-1)


def _warmth(p):
    """The factor of each token, as a column."""
    rise = p.config.llama_4_scaling_beta * np.log(1 + PLACES // 4)
    return (1 + rise)[:, None, None]


def _short_factors(p):
    """RoPE as for texts within the trained context."""
    speeds, factor = frequencies(p.config, 1)
    x = turned(p.heads("self_attn.q_proj"), np.outer(PLACES, speeds), factor=factor)
    return x * _warmth(p)


def _cool(p):
    return p.right / _warmth(p)


def _warm_keys(p):
    return p.right * _warmth(p)


def _width_of_head(p):
    """The first half of a head, with frequencies that divide by the width of the head."""
    x, half = p.heads("self_attn.q_proj"), p.config.head_dim // 2
    first = turned(x[..., :half], np.outer(PLACES, omega(p.config)[: half // 2]))
    return np.concatenate([first, x[..., half:]], axis=-1)


def _by_head(p):
    x = p.heads("self_attn.q_proj")
    return turned(x.swapaxes(1, 2), np.outer(np.arange(x.shape[2]), omega(p.config))).swapaxes(1, 2)


def _narrow_phases(dtype, parts=("positions", "omega", "phases")):
    """RoPE with some parts of the phases rounded."""

    def wrong(p):
        def rounded(part, array):
            array = array.astype(np.float32)
            return narrow(array, dtype) if part in parts else array

        places = rounded("positions", p.positions)
        phases = rounded("phases", np.outer(places, rounded("omega", omega(p.config))))
        return turned(p.heads("self_attn.q_proj"), phases)

    return wrong


def _narrow_table(rounding):
    def wrong(p):
        x = p.heads("self_attn.q_proj")
        a, b = np.split(x, 2, axis=-1)
        phases = np.outer(PLACES, omega(p.config))[None, :, None]
        cos, sin = (rounding(f(phases).astype(np.float32)) for f in (np.cos, np.sin))
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    return wrong


def _yarn_sine(p):
    # The right array's cosines carry the factor; divide the sines' part by it.
    x = p.heads("self_attn.q_proj").astype(np.float64)
    factor = 0.1 * math.log(p.config.rope_scaling.factor) + 1
    a, b = np.split(x, 2, axis=-1)
    c, d = np.split(p.right.astype(np.float64), 2, axis=-1)
    size = a * a + b * b
    cos, sin = (a * c + b * d) / size, (a * d - b * c) / size / factor
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _yarn_factor(power):
    """RoPE with another power of yarn's attention factor."""

    def wrong(p):
        speeds, factor = frequencies(p.config)
        phases = np.outer(PLACES, speeds)
        return turned(p.heads("self_attn.q_proj"), phases, factor=factor**power)

    return wrong


def _with_scaling(**parameters):
    """RoPE of the config with other parameters of its scaling."""

    def wrong(p):
        scaling = replace(p.config.rope_scaling, **parameters)
        speeds, factor = frequencies(replace(p.config, rope_scaling=scaling))
        return turned(p.heads("self_attn.q_proj"), np.outer(PLACES, speeds), factor=factor)

    return wrong


STALE = np.concatenate([np.arange(9), np.arange(COUNT - 9)])
MISTAKES = [
    Mistake("RoPE layout interleaved", Q_ROPE, _rope("self_attn.q_proj", layout="interleaved")),
    Mistake(
        "RoPE layout interleaved",
        "self_attn.k_rope",
        _rope("self_attn.k_proj", layout="interleaved"),
    ),
    Mistake("RoPE pairs put back in the other layout", Q_ROPE, _put_back),
    Mistake("RoPE rotated the other way", Q_ROPE, _rope("self_attn.q_proj", sign=-1)),
    Mistake("another rope_theta", Q_ROPE, _theta(10000.0)),
    Mistake("another rope_theta", Q_ROPE, _theta(500000.0)),
    Mistake("RoPE of another layer", Q_ROPE, _theta(100.0), "theta by layer"),
    Mistake("longrope's factors of another length", Q_ROPE, _short_factors, "longrope"),
    Mistake("query temperature missing", Q_ROPE, _cool, "longrope"),
    Mistake("query temperature on keys", "self_attn.k_rope", _warm_keys, "longrope"),
    Mistake("RoPE on a layer without it", Q_ROPE, _theta(2000.0), "layer without RoPE"),
    Mistake("RoPE exponent", Q_ROPE, _theta(2000.0**2)),
    Mistake("RoPE position off by one", Q_ROPE, _at(PLACES + 1)),
    Mistake("RoPE position off by one", Q_ROPE, _at(PLACES - 1)),
    Mistake("RoPE at other positions", Q_ROPE, _at(STALE)),
    Mistake("RoPE at other positions", Q_ROPE, _at(np.full(COUNT, 3))),
    Mistake("RoPE at other positions", Q_ROPE, _at(PLACES + 7)),
    Mistake("RoPE by head", Q_ROPE, _by_head),
    Mistake(
        "RoPE scaling ignored",
        Q_ROPE,
        _rope("self_attn.q_proj"),
        "linear",
    ),
    Mistake("RoPE scaling ignored", Q_ROPE, _rope("self_attn.q_proj"), "llama3"),
    Mistake("RoPE scaling ignored", Q_ROPE, _rope("self_attn.q_proj"), "yarn"),
    Mistake("RoPE scaling ignored", Q_ROPE, _rope("self_attn.q_proj"), "dynamic"),
    Mistake(
        "RoPE scaling of another kind",
        Q_ROPE,
        _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c) / 8)),
        "llama3",
    ),
    Mistake("another parameter of RoPE scaling", Q_ROPE, _with_scaling(truncate=False), "yarn"),
    Mistake(
        "another parameter of RoPE scaling",
        Q_ROPE,
        _with_scaling(original_max_position_embeddings=16),
        "llama3",
    ),
    Mistake(
        "RoPE scaling factor inverted",
        Q_ROPE,
        _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c) * 3)),
        "linear",
    ),
    Mistake(
        "RoPE with other frequencies",
        Q_ROPE,
        _rope("self_attn.q_proj", phases=lambda c: np.outer(PLACES, omega(c)[::-1] / 2)),
    ),
    Mistake("attention factor of yarn missing", Q_ROPE, _yarn_factor(0), "yarn"),
    Mistake("attention factor of yarn misused", Q_ROPE, _yarn_factor(2), "yarn"),
    Mistake("attention factor of yarn misused", Q_ROPE, _yarn_sine, "yarn"),
    Mistake("RoPE not applied", Q_ROPE, lambda p: p.heads("self_attn.q_proj")),
    Mistake(
        "RoPE applied twice",
        Q_ROPE,
        lambda p: turned(p.right, np.outer(PLACES, omega(p.config))),
    ),
    Mistake("RoPE cosine and sine swapped", Q_ROPE, _cos_sin),
    Mistake("RoPE on half of the channels", Q_ROPE, _one_half),
    Mistake("partial RoPE", Q_ROPE, _partial),
    Mistake("partial RoPE", Q_ROPE, _rope("self_attn.q_proj"), "partial RoPE"),
    Mistake(
        "RoPE exponent by the hidden size",
        Q_ROPE,
        _width_of_head,
        "partial RoPE",
        also=("RoPE exponent",),
    ),
    Mistake("RoPE phases in bfloat16", Q_ROPE, _narrow_phases(ml_dtypes.bfloat16), first=300),
    Mistake("RoPE phases in float16", Q_ROPE, _narrow_phases(np.float16), first=3000),
    *(
        Mistake(
            "RoPE phases in bfloat16", Q_ROPE, _narrow_phases(ml_dtypes.bfloat16, parts), first=300
        )
        for parts in (
            ("omega",),
            ("positions",),
            ("phases",),
            ("positions", "omega"),
            ("omega", "phases"),
        )
    ),
    Mistake("RoPE table in bfloat16", Q_ROPE, _narrow_table(lambda y: narrow(y))),
    Mistake(
        "RoPE table in float16",
        Q_ROPE,
        _narrow_table(lambda y: narrow(y, np.float16)),
    ),
    Mistake("RoPE table in few bits", Q_ROPE, _narrow_table(lambda y: np.round(y * 256) / 256)),
    Mistake("padding counted in positions", Q_ROPE, _at(PLACES), padded=True),
]
