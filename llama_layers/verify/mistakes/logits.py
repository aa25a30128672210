"""Logits that were written as something else that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.near import is_near, worst_of_product
from llama_layers.verify.mistakes.registry import Changed, evaluated, mistake, moved
from llama_layers.verify.operations import Linear, Product
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.rules import Weights
from llama_layers.verify.tracked import Tracked

_HEAD = ("lm_head",)


@mistake(Linear, "logits centred", roles=_HEAD)
def _(n: Product) -> Tracked:
    """The array is the logits less their mean over the vocabulary; it should be the logits."""
    y = Linear.formula(n)
    return y - y.mean()


@mistake(Linear, "logits less their maximum", roles=_HEAD)
def _(n: Product) -> Tracked:
    """The array is the logits less the largest of each token; it should be the logits."""
    y = Linear.formula(n)
    return y - y.max()


@mistake(Linear, "log-probabilities for logits", roles=_HEAD)
def _(n: Product) -> Tracked:
    """The array is the logarithm of the softmax of the logits; it should be the logits."""
    y = Linear.formula(n)
    shifted = y - y.max()  # whose exponentials have a sum of 1 or more
    return shifted - shifted.exp().sum().apply(np.log)


@mistake(Linear, "probabilities for logits", roles=_HEAD)
def _(n: Product) -> Tracked:
    """The array is the softmax of the logits; it should be the logits."""
    return Weights.of(Linear.formula(n), None).probabilities()


@mistake(Linear, "logits capped", roles=_HEAD)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Caps logits y as {0:g} tanh(y / {0:g}), as Gemma 2 does; it should leave them as they are."""
    for cap in (30.0, 50.0, 20.0, 15.0):

        def capped(y: Float64Array, cap: float = cap) -> Float64Array:
            return np.asarray(cap * np.tanh(y / cap))

        if _is_near(at, capped):
            yield evaluated(linear, lambda n, f: Linear.formula(n).apply(f), capped), cap


def _is_near(at: FailingSite, change: Callable[[Float64Array], Float64Array]) -> bool:
    """Whether the worst logits are nearer to changed ones."""
    places = np.ix_(np.arange(len(at.computed)), *worst_of_product(at))
    return is_near(at, change(at.bound(at.formats).exact[places]), places)


@mistake(Linear, "logits scaled", roles=_HEAD)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies logits by {0}; it should leave them as they are."""
    width = linear.x.shape[-1]
    numbers = {f"{factor:g}": factor for factor in (-1.0, 0.5, 0.6, 0.7, 0.8, 0.9)}
    numbers |= {f"1 / {factor:g}": 1 / factor for factor in (0.6, 0.7, 0.8, 0.9)}
    roots = {"1 / sqrt(hidden_size)": width**-0.5, "sqrt(hidden_size)": width**0.5}
    for said, factor in (numbers | {"2": 2.0, "1 / hidden_size": 1 / width} | roots).items():
        if _is_near(at, partial(np.multiply, factor)):
            yield moved(at, partial(np.multiply, factor)), said


@mistake(Linear, "vocabulary shifted", roles=_HEAD)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Has at each id the logit of id {0:+d}; it should have its own."""
    for step in (1, -1):
        yield replace(linear, weight=np.roll(linear.weight, -step, axis=0)), step
