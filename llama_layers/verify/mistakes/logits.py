"""Logits that were written as something else that is made of them."""

from __future__ import annotations

import numpy as np

from llama_layers.verify.mistakes.registry import mistake
from llama_layers.verify.operations import Linear, Product
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
