"""Mistakes in how attention weighs: with another function of scores and mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.attention import Heads
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.near import weighed
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake
from llama_layers.verify.operations import Attention, Operation, Probabilities, Softmax
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.tracked import Tracked

WEIGHING = Attention | Probabilities | Softmax
_LARGEST = float(np.finfo(np.float32).max)


def hidden_at(heads: Heads, score: float) -> Tracked:
    """The scores, those of hidden keys at a fixed one."""
    scores = heads.scores()
    return scores if heads.allowed is None else scores.where(heads.allowed, score)


def exponentials(heads: Heads) -> Tracked:
    """The exponentials of the scores above the largest; 0 for hidden keys."""
    scores = hidden_at(heads, -np.inf)
    return (scores - scores.max()).exp()


def total(heads: Heads, weights: Tracked, shift: Tracked | float = 0.0) -> Tracked:
    """The sum of exponentials, of scores less a shift, with that of the sink."""
    found = weights.sum()
    if heads.sinks is None:
        return found
    own = np.exp(heads.sinks) if isinstance(shift, float) else (-shift + heads.sinks).exp()
    return found + own


@mistake(WEIGHING, "softmax over the queries", mixes=True)
def _(heads: Heads) -> Tracked:
    """Normalises over the queries; it should normalise over the keys."""
    scores = hidden_at(heads, -np.inf)
    weights = (scores - scores.max(axis=-2)).exp()
    return heads.weigh(weights / weights.sum(axis=-2))


@mistake(WEIGHING, "softmax over queries and keys", mixes=True)
def _(heads: Heads) -> Tracked:
    """Normalises over the queries and then over the keys; it should normalise over the keys
    alone."""
    weights = exponentials(heads)
    weights = weights / weights.sum(axis=-2)
    return heads.weigh(weights / weights.sum())


@mistake(WEIGHING, "softmax not normalised")
def _(heads: Heads) -> Tracked:
    """Does not divide the exponentials by their sum."""
    return heads.weigh(exponentials(heads))


@mistake(WEIGHING, "exponentials without softmax")
def _(heads: Heads) -> Tracked:
    """Weighs with the exponentials of the scores themselves; it should weigh with their softmax."""
    return heads.weigh(hidden_at(heads, -np.inf).exp())


@mistake(WEIGHING, "softmax without the shift")
def _(operation: WEIGHING, at: FailingSite) -> Computed:
    """Takes exponentials without subtracting the largest score, so that they overflow; it should
    subtract it."""

    def formula(heads: Heads) -> Tracked:
        weights = hidden_at(heads, -np.inf).exp()
        fits = weights.exact <= _LARGEST
        every = total(heads, weights).where(fits.all(axis=-1, keepdims=True), np.inf)
        return heads.weigh(weights.where(fits, np.inf) / every)

    def of(operation: Operation[Heads]) -> Computed:
        def few(tokens: NDArray[np.intp]) -> Computed | None:
            some = operation.at_tokens(tokens)
            return None if some is None else of(some)

        def bound(how: Rounding) -> Bound:
            found = operation.evaluate(formula, how)
            return replace(found, limit=np.where(np.isnan(found.exact), 0.0, found.limit))

        return Computed(bound, few)

    return of(operation)


@mistake(WEIGHING, "softmax with one more")
def _(heads: Heads) -> Tracked:
    """Adds one to the sum of the exponentials."""
    scores = hidden_at(heads, -np.inf)
    largest = scores.max()
    weights = (scores - largest).exp()
    return heads.weigh(weights / (total(heads, weights, largest) + (-largest).exp()))


@mistake(WEIGHING, "softmax with one more")
def _(heads: Heads) -> Tracked:
    """Adds one to the sum of the exponentials after it has subtracted the largest score from all;
    it should leave the sum as it is."""
    scores = hidden_at(heads, -np.inf)
    largest = scores.max()
    weights = (scores - largest).exp()
    return heads.weigh(weights / (total(heads, weights, largest) + 1.0))


@mistake(WEIGHING, "masked after softmax")
def _(heads: Heads) -> Tracked:
    """Hides keys after the softmax; it should hide them before it."""
    weights = replace(heads, mask=None).probabilities()
    return heads.weigh(weights if heads.allowed is None else weights.where(heads.allowed, 0.0))


@mistake(WEIGHING, "hidden keys at a score too high")
def _(operation: WEIGHING, at: FailingSite) -> Iterator[Changed]:
    """Puts hidden keys at {0}, which other scores come near; it should put them at minus
    infinity."""
    if operation.mask is None:
        return
    for score in (-2.0, -3.0, -5.0, -10.0, -20.0, -30.0, -50.0, -100.0, -1e3, -1e4):
        for added, said in (
            (False, f"a score of {score:g}"),
            (True, f"their score less {-score:g}"),
        ):
            if found := weighed(operation, at, lowered, score, added):
                yield found, said


def lowered(heads: Heads, score: float, added: bool) -> Tracked:
    """Attention with hidden keys at a score, or with one added to theirs."""
    if not added:
        return heads.weigh(heads.probabilities_of(hidden_at(heads, score)))
    hidden = 0.0 if heads.allowed is None else np.where(heads.allowed, 0.0, score)
    return heads.weigh(heads.probabilities_of(heads.scores() + hidden))


@mistake(WEIGHING, "uniform attention", parts=True)
def _(operation: WEIGHING, at: FailingSite) -> Iterator[Changed]:
    """Weighs {0} alike, as where all scores are the same; it should weigh them with the softmax of
    the scores."""
    sinks = (True, False) if vars(operation).get("sinks") is not None else (True,)
    for seen, said in ((False, "all keys, later ones too,"), (True, "the keys that are seen")):
        for with_sinks in sinks:
            if found := weighed(operation, at, _alike, seen, with_sinks):
                yield found, said


def _alike(heads: Heads, seen: bool, with_sinks: bool) -> Tracked:
    allowed = heads.allowed if seen else None
    heads = heads if with_sinks else replace(heads, sinks=None)
    return heads.weigh(heads.probabilities_of(0.0 * heads.scores(), allowed))


@mistake(WEIGHING, "only the largest scores", parts=True)
def _(operation: WEIGHING, at: FailingSite) -> Changed | None:
    """Weighs the {0} keys with the largest scores only; it should weigh all that are seen."""
    # Queries that see no more keys than that are right.
    if operation.mask is None:
        return None
    axes = (1, 3) if at.site.pairwise else (2, 3)
    wrong = (at.ratio > 1).any(axis=axes)
    seen = np.broadcast_to(np.asarray(operation.mask).sum(axis=-1), wrong.shape)
    count = int(seen[wrong].min() - 1 if wrong.any() else seen.max() // 2)
    if count < 1 or 2 * np.count_nonzero(wrong) < wrong.any() * np.count_nonzero(seen > count):
        return None
    found = weighed(operation, at, _of_largest, count)
    return (found, count) if found else None


def _of_largest(heads: Heads, count: int) -> Tracked:
    scores = hidden_at(heads, -np.inf)
    least = np.partition(scores.exact, -count, axis=-1)[..., -count, None]
    return heads.weigh(heads.probabilities_of(scores.where(scores.exact >= least, -np.inf)))


@mistake(WEIGHING, "newest slot not written", kind=Kind.SOLVED)
def _(operation: WEIGHING, at: FailingSite) -> Changed | None:
    """Reads zeros for a token's own key and value, as from a slot that is written too late; it
    should write them before it reads."""
    if operation.mask is None or np.asarray(operation.mask).dtype != bool:
        return None
    return weighed(operation, at, _own_of_zeros)


def _own_of_zeros(heads: Heads) -> Tracked:
    assert heads.allowed is not None
    # The last key that a token sees is its own.
    count = heads.allowed.shape[-1]
    last = count - 1 - np.argmax(heads.allowed[..., ::-1], axis=-1)
    others = np.arange(count) != last[..., None]
    weights = heads.probabilities_of(heads.scores().where(others, 0.0), heads.allowed)
    return heads.weigh(weights.where(others, 0.0))


@mistake(WEIGHING, "hidden keys at 0")
def _(heads: Heads) -> Tracked:
    """Gives hidden keys a score of 0; it should give them minus infinity."""
    return heads.weigh(heads.probabilities_of(hidden_at(heads, 0.0)))


@mistake(WEIGHING, "softmax left out")
def _(heads: Heads) -> Tracked:
    """Weighs with the scores themselves; it should weigh with their softmax."""
    return heads.weigh(hidden_at(heads, 0.0))
