"""Mistakes in silu(gate) times up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.hypotheses.hypothesis import Float64Array, Formula, Hypothesis, wide
from llama_layers.verify.operations import Gate

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(g: Float64Array) -> Float64Array:
    decay = np.exp(-np.abs(g))
    return np.asarray(np.where(g >= 0, 1.0, decay) / (1 + decay))


def _silu(g: Float64Array) -> Float64Array:
    return g * _sigmoid(g)


def _gelu(g: Float64Array) -> Float64Array:
    return np.asarray(g * (1 + _erf(g / math.sqrt(2))) / 2)


def _gelu_tanh(g: Float64Array) -> Float64Array:
    return np.asarray(g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2)


FORMULAS: dict[str, tuple[Callable[[Float64Array, Float64Array], Float64Array], str]] = {
    "gelu for silu": (lambda g, u: _gelu(g) * u, "gelu(gate) * up"),
    "gelu (tanh) for silu": (lambda g, u: _gelu_tanh(g) * u, "gelu_tanh(gate) * up"),
    "gelu (sigmoid) for silu": (
        lambda g, u: g * _sigmoid(1.702 * g) * u,
        "gate * sigmoid(1.702 * gate) * up",
    ),
    "relu for silu": (lambda g, u: np.maximum(g, 0) * u, "relu(gate) * up"),
    "relu squared for silu": (lambda g, u: np.maximum(g, 0) ** 2 * u, "relu(gate)^2 * up"),
    "sigmoid for silu": (lambda g, u: _sigmoid(g) * u, "sigmoid(gate) * up"),
    "tanh for silu": (lambda g, u: np.tanh(g) * u, "tanh(gate) * up"),
    "gate and up swapped in the product": (lambda g, u: g * _silu(u), "gate * silu(up)"),
    "up left out": (lambda g, u: _silu(g), "silu(gate)"),
    "gate left out": (lambda g, u: u, "up"),
    "no activation": (lambda g, u: g * u, "gate * up"),
    "silu of the product": (lambda g, u: _silu(g * u), "silu(gate * up)"),
    "silu twice": (lambda g, u: _silu(_silu(g)) * u, "silu(silu(gate)) * up"),
    "silu of both": (lambda g, u: _silu(g) * _silu(u), "silu(gate) * silu(up)"),
    "gate and up added": (lambda g, u: _silu(g) + u, "silu(gate) + up"),
}


def _formula(
    formula: Callable[[Float64Array, Float64Array], Float64Array],
) -> Callable[[Gate, FailingSite], Iterator[Formula]]:
    def changes(gate: Gate, failing: FailingSite) -> Iterator[Formula]:
        g, u = wide(gate.gate), wide(gate.up)
        exact = formula(g, u)
        # The tails of erf and tanh cancel: errors are relative to the factors, not to the result.
        size = np.minimum(np.abs(g), 8) + 1
        yield Formula(exact, np.abs(exact) * size + np.abs(g * u) * np.exp(-np.abs(g) / 8), 12)

    return changes


HYPOTHESES = tuple(
    Hypothesis(
        name,
        Gate,
        _formula(formula),
        f"The port seems to compute {text}; it should be silu(gate) * up.",
    )
    for name, (formula, text) in FORMULAS.items()
)
