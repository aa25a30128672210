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
from tests.support.ported import silu

_erf = np.vectorize(math.erf)


def _gate(formula):
    return lambda p: formula(p[GATE].astype(np.float64), p[UP].astype(np.float64))


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
    Mistake("gate and up swapped in the product", ACT, _gate(lambda g, u: silu(u) * g)),
    Mistake("up left out", ACT, _gate(lambda g, u: silu(g))),
    Mistake("gate left out", ACT, _gate(lambda g, u: u)),
    Mistake("no activation", ACT, _gate(lambda g, u: g * u)),
    Mistake("silu of the product", ACT, _gate(lambda g, u: silu(g * u))),
    Mistake("silu twice", ACT, _gate(lambda g, u: silu(silu(g)) * u)),
    Mistake("silu of both", ACT, _gate(lambda g, u: silu(g) * silu(u))),
    Mistake("gate and up added", ACT, _gate(lambda g, u: silu(g) + u)),
]
