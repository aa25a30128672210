"""Mistakes in how attention weighs: with another function of scores and mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_layers.verify.attention import Heads
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.registry import Computed, mistake
from llama_layers.verify.operations import Attention, Probabilities, Softmax
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.rules import Weights
from llama_layers.verify.tracked import Tracked

_WEIGHING = Attention | Probabilities | Softmax
_LARGEST = float(np.finfo(np.float32).max)


def _hidden_at(heads: Heads, score: float) -> Tracked:
    """The scores, those of hidden keys at a fixed one."""
    scores = heads.scores()
    return scores if heads.allowed is None else scores.where(heads.allowed, score)


def _exponentials(heads: Heads) -> Tracked:
    """The exponentials of the scores above the largest; 0 for hidden keys."""
    scores = _hidden_at(heads, -np.inf)
    return (scores - scores.max()).exp()


def _softmax(scores: Tracked) -> Tracked:
    """The softmax over all keys."""
    return Weights.of(scores, None).probabilities()


@mistake(_WEIGHING, "softmax over the queries")
def _(heads: Heads) -> Tracked:
    """Normalises over the queries; it should normalise over the keys."""
    scores = _hidden_at(heads, -np.inf)
    weights = (scores - scores.max(axis=-2)).exp()
    return heads.weigh(weights / weights.sum(axis=-2))


@mistake(_WEIGHING, "softmax over queries and keys")
def _(heads: Heads) -> Tracked:
    """Normalises over the queries and then over the keys; it should normalise over the keys
    alone."""
    weights = _exponentials(heads)
    weights = weights / weights.sum(axis=-2)
    return heads.weigh(weights / weights.sum())


@mistake(_WEIGHING, "softmax not normalised")
def _(heads: Heads) -> Tracked:
    """Does not divide the exponentials by their sum."""
    return heads.weigh(_exponentials(heads))


@mistake(_WEIGHING, "exponentials without softmax")
def _(heads: Heads) -> Tracked:
    """Weighs with the exponentials of the scores themselves; it should weigh with their softmax."""
    return heads.weigh(_hidden_at(heads, -np.inf).exp())


@mistake(_WEIGHING, "softmax without the shift")
def _(operation: _WEIGHING, at: FailingSite) -> Computed:
    """Takes exponentials without subtracting the largest score, so that they overflow; it should
    subtract it."""

    def formula(heads: Heads) -> Tracked:
        weights = _hidden_at(heads, -np.inf).exp()
        fits = weights.exact <= _LARGEST
        total = weights.sum().where(fits.all(axis=-1, keepdims=True), np.inf)
        return heads.weigh(weights.where(fits, np.inf) / total)

    def bound(how: Rounding) -> Bound:
        found = operation.evaluate(formula, how)
        return replace(found, limit=np.where(np.isnan(found.exact), 0.0, found.limit))

    return Computed(bound)


@mistake(_WEIGHING, "softmax with one more")
def _(heads: Heads) -> Tracked:
    """Adds one to the sum of the exponentials."""
    scores = _hidden_at(heads, -np.inf)
    weights = (scores - scores.max()).exp()
    return heads.weigh(weights / (weights.sum() + (-scores.max()).exp()))


@mistake(_WEIGHING, "masked after softmax")
def _(heads: Heads) -> Tracked:
    """Hides keys after the softmax; it should hide them before it."""
    weights = _softmax(replace(heads, mask=None).scores())
    return heads.weigh(weights if heads.allowed is None else weights.where(heads.allowed, 0.0))


@mistake(_WEIGHING, "hidden keys at -1e4")
def _(heads: Heads) -> Tracked:
    """Gives hidden keys a score of -1e4, which low scores come near; it should give them minus
    infinity."""
    return heads.weigh(_softmax(_hidden_at(heads, -1e4)))


@mistake(_WEIGHING, "hidden keys at -1e4")
def _(heads: Heads) -> Tracked:
    """Adds -1e4 to the scores of hidden keys, which low scores come near; it should give them
    minus infinity."""
    hidden = 0.0 if heads.allowed is None else np.where(heads.allowed, 0.0, -1e4)
    return heads.weigh(_softmax(heads.scores() + hidden))


@mistake(_WEIGHING, "hidden keys at 0")
def _(heads: Heads) -> Tracked:
    """Gives hidden keys a score of 0; it should give them minus infinity."""
    return heads.weigh(_softmax(_hidden_at(heads, 0.0)))


@mistake(_WEIGHING, "softmax left out")
def _(heads: Heads) -> Tracked:
    """Weighs with the scores themselves; it should weigh with their softmax."""
    return heads.weigh(_hidden_at(heads, 0.0))
