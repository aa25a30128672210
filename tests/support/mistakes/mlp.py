"""Mistakes in the MLP."""

from __future__ import annotations

import math

import numpy as np

from tests.support.mistakes.mistake import (
    ACT,
    GATE,
    UP,
    Mistake,
)

_erf = np.vectorize(math.erf)


def _gate(formula):
    return lambda p: formula(p[GATE].astype(np.float64), p[UP].astype(np.float64))


def _acted(formula):
    """With the activation of the model."""
    return lambda p: formula(p.act, p[GATE].astype(np.float64), p[UP].astype(np.float64))


MISTAKES = [
    Mistake("gelu for silu", ACT, _gate(lambda g, u: 0.5 * g * (1 + _erf(g / 2**0.5)) * u)),
    Mistake(
        "gelu (tanh) for silu",
        ACT,
        _gate(lambda g, u: 0.5 * g * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3))) * u),
    ),
    Mistake("gelu (sigmoid) for silu", ACT, _gate(lambda g, u: g / (1 + np.exp(-1.702 * g)) * u)),
    Mistake("relu for silu", ACT, _gate(lambda g, u: np.maximum(g, 0) * u)),
    Mistake("relu squared for silu", ACT, _gate(lambda g, u: np.maximum(g, 0) ** 2 * u)),
    Mistake("sigmoid for silu", ACT, _gate(lambda g, u: u / (1 + np.exp(-g)))),
    Mistake("tanh for silu", ACT, _gate(lambda g, u: np.tanh(g) * u)),
    Mistake("gate and up swapped in the product", ACT, _acted(lambda act, g, u: act(u) * g)),
    Mistake("up left out", ACT, _acted(lambda act, g, u: act(g))),
    Mistake("gate left out", ACT, _gate(lambda g, u: u)),
    Mistake("no activation", ACT, _gate(lambda g, u: g * u)),
    Mistake("silu of the product", ACT, _acted(lambda act, g, u: act(g * u))),
    Mistake("silu twice", ACT, _acted(lambda act, g, u: act(act(g)) * u)),
    Mistake("silu of both", ACT, _acted(lambda act, g, u: act(g) * act(u))),
    Mistake("gate and up added", ACT, _acted(lambda act, g, u: act(g) + u)),
]
