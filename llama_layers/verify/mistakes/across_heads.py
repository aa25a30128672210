"""Mistakes in attention in which heads read each other's scores, or differ in what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.attention import Heads, Tile, broadcast_mask
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.near import FLOAT64, is_near, worst_tokens
from llama_layers.verify.mistakes.registry import Changed, Computed, mistake
from llama_layers.verify.operations import Attention
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.rules import Weights
from llama_layers.verify.tracked import Tracked

Weighing = Callable[[Tracked, NDArray[np.bool_]], Tracked]
"""The weights [heads, S, T] of scores [heads, S, T] and the keys [S, T] that may be seen."""


def joined(parts: Sequence[Tracked], axis: int) -> Tracked:
    """Tracked numbers, one after the other along an axis."""
    exact, off, usual = (
        np.concatenate([np.broadcast_to(getattr(p, n), p.shape) for p in parts], axis)
        for n in ("exact", "off", "usual")
    )
    return parts[0].with_errors((off, usual), exact)


def _across(attention: Attention, weighing: Weighing, how: Rounding) -> Bound:
    """Attention of which all heads are weighed at once."""
    arrays = {name: to_numpy(getattr(attention, name)) for name in "qkv"}
    scale, cap = attention.scale, attention.cap
    batch, queries, heads, _ = arrays["q"].shape
    _, keys, groups, _ = arrays["k"].shape
    mask = broadcast_mask(attention.mask, batch, queries, keys)
    results = [np.zeros(arrays["q"].shape) for _ in range(3)]
    for b in range(batch):
        tile = Tile(slice(b, b + 1), slice(0, groups), slice(0, queries), heads // groups)
        part = Heads(**tile.read(arrays, how, scale), mask=None, scale=scale, cap=cap, sinks=None)
        allowed = np.ones((queries, keys), bool) if mask is None else mask[b]
        scores = part.scores()
        weights = weighing(scores.moved(lambda y: y.reshape(heads, queries, keys)), allowed)
        bound = part.weigh(weights[None].moved(tile.grouped)).bound()
        for array, found in zip(results, (bound.exact, bound.limit, bound.usual), strict=True):
            tile.write(array.transpose(0, 2, 1, 3), found)
    return Bound(*results)


def _if_near(attention: Attention, at: FailingSite, weighing: Weighing) -> Computed | None:
    queries = worst_tokens(at)
    few = attention.at_tokens(queries)
    assert isinstance(few, Attention)
    found = _across(few, weighing, FLOAT64).exact
    if not is_near(at, found, np.s_[:, queries]):
        return None
    return Computed(lambda how: _across(attention, weighing, how))


@mistake(Attention, "softmax over the heads")
def _(attention: Attention, at: FailingSite) -> Iterator[Changed]:
    """Normalises over the heads; it should normalise over the keys."""
    # Hidden keys weigh nothing, or alike in each head if their scores are large and finite.
    for hidden in (0.0, 1.0 / attention.q.shape[2]):

        def over_heads(
            scores: Tracked, allowed: NDArray[np.bool_], hidden: float = hidden
        ) -> Tracked:
            weights = (scores - scores.max(axis=0)).exp()
            return (weights / weights.sum(axis=0)).where(allowed, hidden)

        if found := _if_near(attention, at, over_heads):
            yield found


@mistake(Attention, "scores lowered by distance")
def _(attention: Attention, at: FailingSite) -> Changed | None:
    """Lowers each score by the distance of its tokens times a slope of the head, as ALiBi does; it
    should leave them as they are."""
    heads = attention.q.shape[2]
    slopes = 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)

    def lowered(scores: Tracked, allowed: NDArray[np.bool_]) -> Tracked:
        # What all keys of a query share changes nothing: the distance from the first key will do.
        keys = np.arange(scores.shape[-1])
        return Weights.of(scores + slopes[:, None, None] * keys, allowed).probabilities()

    return _if_near(attention, at, lowered)
