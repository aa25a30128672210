"""Mistakes in silu(gate) times up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llama_layers.verify.mistakes.registry import mistake
from llama_layers.verify.operations import Gate
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.rules import gated, silu
from llama_layers.verify.tracked import Tracked

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(g: Tracked) -> Tracked:
    def function(g: Float64Array) -> Float64Array:
        decay = np.exp(-np.abs(g))
        return np.asarray(np.where(g >= 0, 1.0, decay) / (1 + decay))

    return g.apply(function, slope=0.25)


def _relu(g: Tracked) -> Tracked:
    return g.apply(lambda g: np.maximum(g, 0))


@mistake(Gate, "gelu for silu", common=1)
def _(g: Gate) -> Any:
    """Computes gelu(gate) * up; it should compute silu(gate) * up."""
    normal = 1 + (g.gate * math.sqrt(0.5)).apply(_erf, slope=1.13)
    return (g.gate * 0.5 * normal).step("silu") * g.up


@mistake(Gate, "gelu (tanh) for silu", common=1)
def _(g: Gate) -> Any:
    """Computes gelu_tanh(gate) * up; it should compute silu(gate) * up."""
    inner = math.sqrt(2 / math.pi) * (g.gate + 0.044715 * (g.gate * g.gate * g.gate))
    return (g.gate * 0.5 * (1 + inner.apply(np.tanh))).step("silu") * g.up


@mistake(Gate, "gelu (sigmoid) for silu")
def _(g: Gate) -> Any:
    """Computes gate * sigmoid(1.702 * gate) * up; it should compute silu(gate) * up."""
    return (silu(1.702 * g.gate) / 1.702).step("silu") * g.up


@mistake(Gate, "relu for silu")
def _(g: Gate) -> Any:
    """Computes relu(gate) * up; it should compute silu(gate) * up."""
    return _relu(g.gate) * g.up


@mistake(Gate, "relu squared for silu")
def _(g: Gate) -> Any:
    """Computes relu(gate)^2 * up; it should compute silu(gate) * up."""
    return (_relu(g.gate) * _relu(g.gate)).step("silu") * g.up


@mistake(Gate, "sigmoid for silu")
def _(g: Gate) -> Any:
    """Computes sigmoid(gate) * up; it should compute silu(gate) * up."""
    return _sigmoid(g.gate).step("silu") * g.up


@mistake(Gate, "tanh for silu")
def _(g: Gate) -> Any:
    """Computes tanh(gate) * up; it should compute silu(gate) * up."""
    return g.gate.apply(np.tanh).step("silu") * g.up


@mistake(Gate, "gate and up swapped in the product", common=1)
def _(g: Gate) -> Any:
    """Computes gate * silu(up); it should compute silu(gate) * up."""
    return gated(g.up, g.gate)


@mistake(Gate, "up left out")
def _(g: Gate) -> Any:
    """Computes silu(gate); it should compute silu(gate) * up."""
    return silu(g.gate).step("silu")


@mistake(Gate, "gate left out")
def _(g: Gate) -> Any:
    """Computes up; it should compute silu(gate) * up."""
    return g.up


@mistake(Gate, "no activation")
def _(g: Gate) -> Any:
    """Computes gate * up; it should compute silu(gate) * up."""
    return g.gate * g.up


@mistake(Gate, "silu of the product")
def _(g: Gate) -> Any:
    """Computes silu(gate * up); it should compute silu(gate) * up."""
    return silu(g.gate * g.up)


@mistake(Gate, "silu twice")
def _(g: Gate) -> Any:
    """Computes silu(silu(gate)) * up; it should compute silu(gate) * up."""
    return gated(silu(g.gate).step("silu"), g.up)


@mistake(Gate, "silu of both")
def _(g: Gate) -> Any:
    """Computes silu(gate) * silu(up); it should compute silu(gate) * up."""
    return silu(g.gate).step("silu") * silu(g.up).step("silu")


@mistake(Gate, "gate and up added")
def _(g: Gate) -> Any:
    """Computes silu(gate) + up; it should compute silu(gate) * up."""
    return silu(g.gate).step("silu") + g.up
