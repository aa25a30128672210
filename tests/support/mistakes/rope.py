"""Mistakes in RoPE."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from tests.support.decoder_oracle import frequencies
from tests.support.mistakes.mistake import (
    PLACES,
    Q_ROPE,
    Mistake,
)
from tests.support.ported import COUNT, narrow, turned


def _rope(**how):
    def wrong(p):
        options = {k: v for k, v in how.items() if k != "omega"}
        return p.turned(p.unturned, how["omega"](p) if "omega" in how else None, **options)

    return wrong


def _theta_of_another_layer(p):
    return p.turned(p.unturned, p.at(0).omega(), factor=p.at(0).factor)


def _theta(theta):
    return _rope(omega=lambda p: p.omega(rope_theta=theta))


def _at(places):
    return _rope(places=places)


def _put_back(p):
    x = p.unturned
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    return p.turned(halves, layout="half")


def _cos_sin(p):
    return p.turned(p.unturned, table=(np.sin, np.cos))


def _one_half(p):
    right, x = p.right.copy(), p.unturned
    right[..., x.shape[-1] // 2 :] = x[..., x.shape[-1] // 2 :]
    return right


def _partial(p):
    return p.turned(p.unturned, p.omega(partial_rotary_factor=0.5))


def _warmth(p):
    """The factor of each token, as a column."""
    return p.warmth[:, None, None]


def _short_factors(p):
    """RoPE as for texts within the trained context."""
    return p.turned(p.unturned, frequencies(p.config, 1, p.layer)[0])


def _cool(p):
    return p.right / _warmth(p)


def _warm_keys(p):
    return p.right * _warmth(p)


def _width_of_head(p):
    """The first half of a head, with frequencies that divide by the width of the head."""
    return p.turned(p.unturned, p.plain(p.config.head_dim)[: p.config.head_dim // 4])


def _by_head(p):
    x = p.unturned.swapaxes(1, 2)
    phases = np.outer(np.arange(x.shape[1]), p.omega())
    y = turned(x, phases, p.layout, p.factor).swapaxes(1, 2)
    return y * _warmth(p) if p.config.llama_4_scaling_beta else y


def _narrow_phases(dtype, parts=("positions", "omega", "phases")):
    """RoPE with some parts of the phases rounded."""

    def wrong(p):
        def rounded(part, array):
            array = array.astype(np.float32)
            return narrow(array, dtype) if part in parts else array

        places = rounded("positions", p.positions)
        phases = rounded("phases", np.outer(places, rounded("omega", p.omega())))
        return p.turned(p.unturned, phases=phases)

    return wrong


def _narrow_table(rounding):
    def wrong(p):
        return p.turned(p.unturned, rounding=rounding)

    return wrong


def _yarn_sine(p):
    # The right array's cosines carry the factor; divide the sines' part by it.
    x = p.unturned.astype(np.float64)
    factor = p.factor
    a, b = np.split(x, 2, axis=-1)
    c, d = np.split(p.right.astype(np.float64), 2, axis=-1)
    size = a * a + b * b
    cos, sin = (a * c + b * d) / size, (a * d - b * c) / size / factor
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _yarn_factor(power):
    """RoPE with another power of yarn's attention factor."""

    def wrong(p):
        return p.turned(p.unturned, factor=p.factor**power)

    return wrong


def _with_scaling(**parameters):
    """RoPE of the config with other parameters of its scaling."""

    def wrong(p):
        scaling = replace(p.config.rope_scaling, **parameters)
        omega, factor = frequencies(replace(p.config, rope_scaling=scaling), COUNT, p.layer)
        return p.turned(p.unturned, omega, factor=factor)

    return wrong


def _plain(p):
    """RoPE without scaling."""
    return p.turned(p.unturned, p.plain(), factor=1)


def _all_channels(p):
    return p.turned(p.unturned, p.plain(p.config.head_dim))


STALE = np.concatenate([np.arange(9), np.arange(COUNT - 9)])
MISTAKES = [
    Mistake("RoPE layout interleaved", Q_ROPE, _rope(layout="interleaved")),
    Mistake(
        "RoPE layout interleaved",
        "self_attn.k_rope",
        _rope(layout="interleaved"),
    ),
    Mistake("RoPE layout half", Q_ROPE, _rope(layout="half"), "interleaved"),
    Mistake("RoPE pairs put back in the other layout", Q_ROPE, _put_back),
    Mistake("RoPE rotated the other way", Q_ROPE, _rope(sign=-1)),
    Mistake("another rope_theta", Q_ROPE, _theta(10000.0)),
    Mistake("another rope_theta", Q_ROPE, _theta(500000.0)),
    Mistake("RoPE of another layer", Q_ROPE, _theta_of_another_layer, "theta by layer"),
    Mistake("longrope's factors of another length", Q_ROPE, _short_factors, "longrope"),
    Mistake("query temperature missing", Q_ROPE, _cool, "temperature"),
    Mistake("query temperature on keys", "self_attn.k_rope", _warm_keys, "temperature"),
    Mistake("RoPE on a layer without it", Q_ROPE, _theta(2000.0), "layer without RoPE"),
    Mistake("RoPE exponent", Q_ROPE, _rope(omega=lambda p: p.omega(rope_theta=p.theta**2))),
    Mistake("RoPE position off by one", Q_ROPE, _at(PLACES + 1)),
    Mistake("RoPE position off by one", Q_ROPE, _at(PLACES - 1)),
    Mistake("RoPE at other positions", Q_ROPE, _at(STALE)),
    Mistake("RoPE at other positions", Q_ROPE, _at(np.full(COUNT, 3))),
    Mistake("RoPE at other positions", Q_ROPE, _at(PLACES + 7)),
    Mistake("RoPE by head", Q_ROPE, _by_head),
    *(
        Mistake("RoPE scaling ignored", Q_ROPE, _plain, scaling)
        for scaling in ("linear", "llama3", "yarn", "dynamic")
    ),
    Mistake(
        "RoPE scaling of another kind",
        Q_ROPE,
        _rope(omega=lambda p: p.plain() / 8),
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
        _rope(omega=lambda p: p.plain() * p.config.rope_scaling.factor),
        "linear",
    ),
    Mistake(
        "RoPE with other frequencies",
        Q_ROPE,
        _rope(omega=lambda p: p.omega()[::-1] / 2),
    ),
    Mistake("attention factor of yarn missing", Q_ROPE, _yarn_factor(0), "yarn"),
    Mistake("attention factor of yarn misused", Q_ROPE, _yarn_factor(2), "yarn"),
    Mistake("attention factor of yarn misused", Q_ROPE, _yarn_sine, "yarn"),
    Mistake("RoPE not applied", Q_ROPE, _rope(places=0 * PLACES)),
    Mistake(
        "RoPE applied twice",
        Q_ROPE,
        lambda p: p.turned(p.right, warm=False),
    ),
    Mistake("RoPE cosine and sine swapped", Q_ROPE, _cos_sin),
    Mistake("RoPE on half of the channels", Q_ROPE, _one_half),
    Mistake("partial RoPE", Q_ROPE, _partial),
    Mistake("partial RoPE", Q_ROPE, _all_channels, "partial RoPE"),
    Mistake(
        "RoPE exponent by the hidden size",
        Q_ROPE,
        _width_of_head,
        "partial RoPE",
        also=("RoPE exponent",),
    ),
    Mistake(
        "RoPE exponent by the hidden size",
        Q_ROPE,
        _rope(omega=lambda p: p.theta ** (-2.0 * np.arange(4) / (32 // 6))),
        "six heads",
    ),
    Mistake(
        "RoPE scaling of another layer", Q_ROPE, _rope(omega=lambda p: p.omega() / 3), "two RoPEs"
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
