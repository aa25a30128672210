"""Mistakes in silu(gate) times up."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.predicted import rounded
from llama_layers.verify.mistakes.registry import Changed, Kind, by_token, mistake
from llama_layers.verify.mistakes.rounding import in_each_narrow_format
from llama_layers.verify.operations import Gate
from llama_layers.verify.pointwise import ACTS, gated, gelu_tanh, silu
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

_WORDS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
_erf = np.vectorize(math.erf, otypes=[np.float64])
Function = Callable[[Float64Array], Float64Array]


def _silu_of(g: Float64Array) -> Float64Array:
    return np.asarray(g / (1 + np.exp(-g)))


def _gelu_of(g: Float64Array) -> Float64Array:
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    return np.asarray(g / 2 * (1 + np.tanh(inner)))


NUMBERS: dict[str, Function] = {"silu": _silu_of, "gelu_pytorch_tanh": _gelu_of}
"""The activations, of numbers."""


def _sigmoid(g: Tracked) -> Tracked:
    def function(g: Float64Array) -> Float64Array:
        decay = np.exp(-np.abs(g))
        return np.asarray(np.where(g >= 0, 1.0, decay) / (1 + decay))

    return g.apply(function, slope=0.25)


def _relu(g: Tracked) -> Tracked:
    return g.apply(lambda g: np.maximum(g, 0))


def _silu(g: Tracked) -> Tracked:
    return silu(g).step("silu")


def _gelu(g: Tracked) -> Tracked:
    return (g * 0.5 * (1 + (g * math.sqrt(0.5)).apply(_erf, slope=1.13))).step("silu")


def _gelu_tanh(g: Tracked) -> Tracked:
    return gelu_tanh(g).step("silu")


def _gelu_sigmoid(g: Tracked) -> Tracked:
    return (silu(1.702 * g) / 1.702).step("silu")


def _act(g: Gate[Tracked], x: Tracked) -> Tracked:
    return ACTS[g.act](x).step("silu")


def _computes(
    name: str, what: str, formula: Callable[[Gate[Tracked]], Tracked], *, common: int = 0
) -> None:
    """Register a formula; one "for silu" or "for gelu" where that is the right activation."""
    act = next((act for act, word in _WORDS.items() if name.endswith(f" for {word}")), None)

    @mistake(
        Gate,
        name,
        says=f"Computes {what}; it should compute {{0}}(gate) * up.",
        common=common,
    )
    def _(gate: Gate, at: FailingSite) -> Changed | None:
        if act not in (None, gate.act):
            return None
        return by_token(gate, formula), _WORDS[gate.act]


_computes("gelu for silu", "gelu(gate) * up", lambda g: _gelu(g.gate) * g.up, common=1)
_computes(
    "gelu (tanh) for silu", "gelu_tanh(gate) * up", lambda g: _gelu_tanh(g.gate) * g.up, common=1
)
_computes(
    "gelu (sigmoid) for silu",
    "gate * sigmoid(1.702 * gate) * up",
    lambda g: _gelu_sigmoid(g.gate) * g.up,
)
_computes("silu for gelu", "silu(gate) * up", lambda g: _silu(g.gate) * g.up, common=1)
_computes("gelu with erf for gelu", "gelu with erf(gate) * up", lambda g: _gelu(g.gate) * g.up)
_computes(
    "gelu with sigmoid for gelu",
    "gate * sigmoid(1.702 * gate) * up",
    lambda g: _gelu_sigmoid(g.gate) * g.up,
)


def _instead(name: str, what: str, formula: Callable[[Tracked], Tracked]) -> None:
    """Register an activation that no model has, instead of each that one has."""
    for word in _WORDS.values():
        _computes(f"{name} for {word}", f"{what} * up", lambda g: formula(g.gate) * g.up)


_instead("relu", "relu(gate)", _relu)
_instead("relu squared", "relu(gate)^2", lambda g: (_relu(g) * _relu(g)).step("silu"))
_instead("sigmoid", "sigmoid(gate)", lambda g: _sigmoid(g).step("silu"))
_instead("tanh", "tanh(gate)", lambda g: g.apply(np.tanh).step("silu"))
_computes(
    "gate and up swapped in the product",
    "gate * {0}(up)",
    lambda g: gated(g.up, g.gate, ACTS[g.act]),
    common=1,
)
_computes("up left out", "{0}(gate)", lambda g: _act(g, g.gate))
_computes("gate left out", "up", lambda g: g.up)
_computes("no activation", "gate * up", lambda g: g.gate * g.up)
_computes("silu of the product", "{0}(gate * up)", lambda g: ACTS[g.act](g.gate * g.up))
_computes(
    "silu twice",
    "{0}({0}(gate)) * up",
    lambda g: gated(_act(g, g.gate), g.up, ACTS[g.act]),
)
_computes("silu of both", "{0}(gate) * {0}(up)", lambda g: _act(g, g.gate) * _act(g, g.up))
_computes("gate and up added", "{0}(gate) + up", lambda g: _act(g, g.gate) + g.up)
_instead(
    "hard swish",
    "gate * relu6(gate + 3) / 6",
    lambda g: (g * (g + 3).apply(lambda y: np.clip(y, 0, 6)) / 6).step("silu"),
)
_computes(
    "hard sigmoid for sigmoid",
    "gate * clip(0.2 gate + 0.5, 0, 1) * up",
    lambda g: g.gate * (0.2 * g.gate + 0.5).apply(lambda y: np.clip(y, 0, 1)) * g.up,
)
_instead(
    "mish",
    "gate * tanh(log(1 + exp(gate)))",
    lambda g: g * g.apply(lambda y: np.tanh(np.logaddexp(0, y))),
)
_instead("softplus", "log(1 + exp(gate))", lambda g: g.apply(lambda y: np.logaddexp(0, y)))
_computes("sigmoid of minus gate", "gate * sigmoid(-gate) * up", lambda g: -_silu(-g.gate) * g.up)
_computes("one added to up", "{0}(gate) * (up + 1)", lambda g: _act(g, g.gate) * (g.up + 1))
_computes("sigmoid of up", "gate * sigmoid(up)", lambda g: g.gate * _sigmoid(g.up))


# Ranges and numbers of steps of tables.
_RANGES, _STEPS = (4, 5, 6, 8, 10, 12, 16), (64, 128, 256, 512, 1024, 2048, 4096)
# Elements in which a table is looked for.
_LOOKED_AT = 256


def _from_table(act: Function, g: Float64Array, top: float, step: float, mode: str) -> Float64Array:
    """act from a table of even steps from -top to top; 0 and the number itself beyond it."""
    place = (np.clip(g, -top, top) + top) / step
    low = np.floor(place)
    if mode == "nearest":
        found = act(np.rint(place) * step - top)
    elif mode == "below":
        found = act(low * step - top)
    else:
        a, b = (act((low + i) * step - top) for i in (0, 1))
        found = a + (place - low) * (b - a)
    return np.where(g > top, g, np.where(g < -top, 0.0, found))


@mistake(Gate, "activation from a table of steps", kind=Kind.SOLVED)
def _(gate: Gate, at: FailingSite) -> Changed | None:
    """Looks {4} up in a table with steps of {0:.4g} from {1:g} to {2:g}, {3}; it should compute
    it."""
    error = np.abs(wide(at.computed) - at.bound(at.formats).exact).ravel()
    size = np.abs(wide(gate.gate)).ravel()
    worst = (np.argsort(-np.nan_to_num(y), kind="stable")[:_LOOKED_AT] for y in (error, size))
    some = np.union1d(*worst)
    g, up, theirs = (wide(y).ravel()[some] for y in (gate.gate, gate.up, at.computed))
    best, act = 0.25 * np.sum(np.square(error[some])), NUMBERS[gate.act]
    found = None
    for top in _RANGES:
        for step in [2 * top / (n - less) for n in _STEPS for less in (0, 1)]:
            for mode in ("nearest", "below", "between"):
                with np.errstate(all="ignore"):
                    y = _from_table(act, g, top, step, mode) * up
                left = np.sum(np.square(y - theirs))
                if left < best:
                    best, found = left, (top, step, mode)
    if found is None:
        return None
    top, step, mode = found
    said = {
        "nearest": "the nearest",
        "below": "the one below",
        "between": "and draws lines between",
    }

    def formula(g: Gate[Tracked]) -> Tracked:
        return g.gate.apply(lambda y: _from_table(act, y, top, step, mode)).step("silu") * g.up

    return by_token(gate, formula), step, -top, top, said[mode], _WORDS[gate.act]


@in_each_narrow_format
def _table_in(narrow: str) -> None:
    form = FLOATS[narrow]

    @mistake(
        Gate,
        f"activation from a table in {narrow}",
        kind=Kind.ROUNDING,
        says=f"Looks the activation up in a table for numbers of {narrow}; it should compute it in "
        "float32.",
    )
    def _(g: Gate[Tracked]) -> Tracked:
        return rounded(ACTS[g.act](rounded(g.gate, form)), form) * g.up
