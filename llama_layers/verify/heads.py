"""What attention reads: some query heads and the key head that they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.rules import Weights, dot
from llama_layers.verify.tracked import Tracked

# Scores held in float64 at a time, in each of the arrays that a bound is made of: 8 MiB.
TILE = 1 << 20


@dataclass(frozen=True, eq=False)
class Heads:
    """Some query heads, the key head that they read, and a mask; only what an operation reads.

    Attributes
    ----------
    q : Tracked or None
        Queries, [heads, S, D].
    k, v : Tracked or None
        Keys and values, [T, D].
    given : Tracked or None
        Scores or probabilities that were recorded, [heads, S, T].
    mask : ndarray or None
        Of bool, [S, T]: which keys may be seen. Of floats: added to the scores.
    scale : float
        The factor of the products of queries and keys.
    """

    q: Tracked | None = None
    k: Tracked | None = None
    v: Tracked | None = None
    given: Tracked | None = None
    mask: Any | None = None
    scale: float = 1.0

    @property
    def allowed(self) -> Any | None:
        """The keys that may be seen, [S, T]; None for all."""
        return None if self.mask is None or self.mask.dtype != bool else self.mask

    def scores(self) -> Tracked:
        """The scores, with a mask added that is one to add."""
        if self.q is None or self.k is None:
            assert self.given is not None
            scores = self.given
        else:
            scores = dot(self.q, self.k, scale=self.scale)
        if self.mask is None or self.mask.dtype == bool:
            return scores
        total: Tracked = scores + self.mask.astype(np.float64)
        return total.step("scores")

    def softmax(self, blocks: int = 0) -> Weights:
        """The softmax of the scores over the keys that are allowed."""
        return Weights.of(self.scores(), self.allowed, blocks)

    def weigh(self, weights: Tracked) -> Tracked:
        """The values weighed, or the weights where an operation reads no values."""
        if self.v is None:
            return weights
        return self.weighted_sum(weights.step("probabilities").step("kv_cache"))

    def weighted_sum(self, weights: Tracked) -> Tracked:
        """The values weighed; an engine may leave out keys that weigh nothing, and their NaN."""
        assert self.v is not None
        total = dot(weights, self.v.moved(lambda values: values.T))
        return total.only(np.isfinite(total.exact))


@dataclass(frozen=True)
class Tile:
    """Some queries of the heads that read one key head."""

    batch: int
    kv: int
    heads: slice
    rows: slice


def tiles(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, rows: int | None = None
) -> Iterator[Tile]:
    """All queries of all heads: `rows` at a time, or as many as have some `TILE` scores."""
    group = heads // kv_heads
    step = max(1, TILE // max(1, group * keys) if rows is None else rows)
    for b in range(batch):
        for h in range(kv_heads):
            for start in range(0, queries, step):
                some = slice(start, min(start + step, queries))
                yield Tile(b, h, slice(h * group, (h + 1) * group), some)


def check_heads(q: Any, **others: Any) -> None:
    """Raise ValueError unless arrays are [B, S, heads, D] and [B, T, kv_heads, D]."""
    float_format("q", q)
    if len(q.shape) != 4:
        raise ValueError(f"q: expected shape [B, S, heads, D], got {list(q.shape)}")
    batch, _, heads, width = q.shape
    for name, array in others.items():
        float_format(name, array)
        shape = tuple(array.shape)
        if len(shape) != 4 or (shape[0], shape[3]) != (batch, width):
            raise ValueError(
                f"{name}: expected shape [{batch}, T, kv_heads, {width}], got {list(shape)}"
            )
        if not shape[2] or heads % shape[2]:
            raise ValueError(f"{name}: expected heads in a divisor of q's {heads}, got {shape[2]}")


def broadcast_mask(mask: Any | None, batch: int, queries: int, keys: int) -> Any | None:
    """The mask [B, S, T]; a ValueError unless it has that shape, or lacks B."""
    if mask is None:
        return None
    array = to_numpy(mask)
    if array.dtype != bool:
        float_format("mask", mask)
    expected = (queries, keys)
    if array.shape not in (expected, (1, *expected), (batch, *expected)):
        raise ValueError(
            f"mask: expected shape {list(expected)} or {[batch, *expected]}, "
            f"got {list(array.shape)}"
        )
    return np.broadcast_to(array, (batch, *expected))
