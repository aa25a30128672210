"""Mistakes that are solved for: in weights, and in results."""

from __future__ import annotations

import numpy as np

from tests.support.mistakes.mistake import ACT, DOWN, GATE, NORM, OUT, UP, Mistake, Q
from tests.support.ported import normed

_RNG = np.random.default_rng(11)
_BIAS = _RNG.standard_normal(32).astype(np.float32)
_FACTORS = _RNG.uniform(0.5, 2, 32).astype(np.float32)
_ORDER = _RNG.permutation(32)
_DOWN, _UP = (_RNG.standard_normal(shape).astype(np.float32) / 8 for shape in ((32, 2), (2, 32)))


def _with_weight(change):
    def wrong(p):
        weight = p.weight(Q).copy()
        change(weight)
        return p[NORM].astype(np.float64) @ weight.T + p.own_bias

    return wrong


def _bit_flipped(weight):
    weight.view(np.uint32)[5, 7] ^= 1 << 25


def _rows_swapped(weight):
    weight[[3, 9]] = weight[[9, 3]]


def _channel_doubled(weight):
    weight[:, 5] *= 2


def _clamped_up(p):
    return p.act(p[GATE]) * np.clip(p[UP], -0.5, 0.5)


def _clamped_gate(p):
    return p.act(np.minimum(p[GATE], 0.25)) * p[UP]


def _tile_of_another(p):
    y = p.right.copy()
    y[1, 4:8, 8:16] = y[1, 0:4, 16:24]
    return y


def _tile_transposed(p):
    y = p.right.copy()
    y[0, 4:12, 8:16] = y[0, 4:12, 8:16].swapaxes(0, 1).copy()
    return y


MISTAKES = [
    Mistake("a tile in another place", OUT, _tile_of_another),
    Mistake("a tile in another place", DOWN, _tile_transposed),
    Mistake("a constant added", OUT, lambda p: p.right + _BIAS),
    Mistake("a constant added", NORM, lambda p: p.right + _BIAS),
    Mistake("outputs scaled", DOWN, lambda p: p.right * _FACTORS),
    Mistake("norm weight scaled by the channel", NORM, lambda p: p.right * _FACTORS),
    Mistake("outputs in another order", DOWN, lambda p: p.right[..., _ORDER]),
    Mistake("outputs in another order", Q, _with_weight(_rows_swapped)),
    Mistake("a wrong weight", Q, _with_weight(_bit_flipped)),
    Mistake("input channels counted otherwise", Q, _with_weight(_channel_doubled)),
    Mistake(
        "a low-rank product added",
        Q,
        lambda p: p[NORM].astype(np.float64) @ (p.weight(Q) + _DOWN @ _UP).T + p.own_bias,
    ),
    Mistake("result clamped", Q, lambda p: np.clip(p.right, -0.5, 0.5)),
    Mistake("gate or up clamped", ACT, _clamped_up),
    Mistake("gate or up clamped", ACT, _clamped_gate),
    Mistake("another eps", NORM, lambda p: normed(p.read, p.gain(), 0.03)),
]
