"""Mistakes in a cache of keys and values, found by replaying the chunks that a port was fed in.

A trace does not say in which chunks the tokens came. So each hypothesis goes through the queries,
and takes for the next chunk the longest that explains what the port has for its queries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.attention_arrays import (
    scores_of,
    sinks_of,
    softmax,
    values_of,
)
from llama_layers.verify.mistakes.registry import Changed, Kind, mistake
from llama_layers.verify.operations import Attention
from llama_layers.verify.report.wording import listed

# Tokens up to which chunks are looked for.
_FEW_TOKENS = 256
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class _Cache:
    """The way a cache treats the tokens from `start` to before `stop`."""

    write: Callable[[Indices, int, int], None]
    """Puts tokens into slots; count + token stands for a token of the last layer."""
    query: Callable[[int, int], int] = lambda token, start: token
    """The slot that a query is taken to stand in, for the mask."""
    first: Callable[[int], int] = lambda start: 0
    """The first slot that is read."""


def _in_place(slots: Indices, start: int, stop: int) -> None:
    slots[start:stop] = np.arange(start, stop)


def _from_its_start(slots: Indices, start: int, stop: int) -> None:
    slots[: stop - start] = np.arange(start, stop)


def _one_late(slots: Indices, start: int, stop: int) -> None:
    new = np.arange(start, stop)
    slots[start + 1 : stop + 1] = new[: len(slots) - start - 1]


def _one_late_in_a_ring(slots: Indices, start: int, stop: int) -> None:
    slots[np.arange(start + 1, stop + 1) % len(slots)] = np.arange(start, stop)


def _shared(slots: Indices, start: int, stop: int) -> None:
    slots[:start] = len(slots) + np.arange(start)
    slots[start:stop] = np.arange(start, stop)


class _Replay:
    """Attention over slots of a cache, a chunk at a time, held against the port's."""

    def __init__(self, operation: Attention, at: FailingSite) -> None:
        self.count = at.recorded.count
        others = at.keys_and_values(at.recorded.config.num_hidden_layers - 1)
        self.k, self.v = (self._bank(getattr(operation, f), others[f]) for f in "kv")
        self._mask = np.broadcast_to(
            np.asarray(operation.mask), (len(operation.q), self.count, self.count)
        )
        banked = replace(operation, k=self.k, v=self.v)
        self._values, self._scores = values_of(banked), scores_of(banked)
        self._sinks = sinks_of(banked)
        self._computed = wide(at.computed)
        keep = at.recorded.keep
        self._judged = np.ones(self._mask.shape[:2], bool) if keep is None else keep
        roundoff = FLOATS[at.formats.dtype].unit_roundoff
        self._most = max(8 * roundoff, 1e-4) * float(np.abs(self._values).max())

    def _bank(self, own: np.ndarray, other: np.ndarray | None) -> np.ndarray:
        """This layer's tokens, the last layer's, and zeros for a slot that nothing is in."""
        other = own if other is None else other.reshape(own.shape)
        return np.concatenate([own, other, np.zeros_like(own[:, :1])], axis=1)

    def counts(self, cache: _Cache) -> tuple[NDArray[np.int64], list[int]] | None:
        """How often each query reads each of the bank, and where chunks start; None if none fit."""
        slots = np.full(self.count, 2 * self.count)
        found = np.zeros((*self._mask.shape[:2], self.k.shape[1]), np.int64)
        starts = [0]
        while starts[-1] < self.count:
            start = starts[-1]
            for stop in range(self.count, start, -1):
                tried = slots.copy()
                cache.write(tried, start, stop)
                first = self._read(cache, tried, start, start + 1, start, stop)
                if not self._fits(first, start, start + 1):
                    continue
                every = self._read(cache, tried, start, stop, start, stop)
                if self._fits(every, start, stop):
                    found[:, start:stop], slots = every, tried
                    starts.append(stop)
                    break
            else:
                return None
        return found, starts[:-1]

    def _read(
        self, cache: _Cache, slots: Indices, low: int, high: int, start: int, stop: int
    ) -> NDArray[np.int64]:
        """For the queries from low to before high of a chunk, how often they read what."""
        counts = np.zeros((len(self._mask), high - low, self.k.shape[1]), np.int64)
        for query in range(low, high):
            place = min(max(cache.query(query, start), 0), self.count - 1)
            seen = self._mask[:, place].copy()
            seen[:, stop:] = False
            seen[:, : cache.first(start)] = False
            for batch, row in enumerate(seen):
                np.add.at(counts[batch, query - low], slots[row], 1)
        return counts

    def _fits(self, counts: NDArray[np.int64], low: int, high: int) -> bool:
        with np.errstate(divide="ignore"):  # what is in two slots counts twice
            scores = self._scores[:, :, low:high] + np.log(counts[:, None])
        y = softmax(scores, counts[:, None] > 0, self._sinks) @ self._values
        error = np.abs(y.transpose(0, 2, 1, 3) - self._computed[:, low:high]).max(axis=(2, 3))
        return bool((error[self._judged[:, low:high]] <= self._most).all())


def _cached(name: str, does: str, *caches: _Cache) -> None:
    @mistake(Attention, name, kind=Kind.SOLVED, says=f"{does}; chunks start at tokens {{0}}.")
    def _(operation: Attention, at: FailingSite) -> Iterator[Changed]:
        if at.recorded.count > _FEW_TOKENS:
            return
        replay = _Replay(operation, at)
        for found in filter(None, map(replay.counts, caches)):
            counts, starts = found
            with np.errstate(divide="ignore"):
                mask = np.log(counts)  # what is in two slots counts twice
            yield replace(operation, k=replay.k, v=replay.v, mask=mask), listed(starts, 7)


_cached(
    "cache not read",
    "lets tokens see only those of their own chunk, and not the cache",
    _Cache(_in_place, first=lambda start: start),
)
_cached(
    "cache written from its start",
    "writes each chunk to the start of its cache, over the first tokens",
    _Cache(_from_its_start),
)
_cached(
    "cache written one place late",
    "writes each chunk to its cache one place late",
    _Cache(_one_late),
    _Cache(_one_late_in_a_ring),
)
_cached(
    "cache shared by all layers", "reads earlier keys and values of the last layer", _Cache(_shared)
)
_cached(
    "no causal mask",
    "lets a token see all of its chunk, later tokens too",
    _Cache(_in_place, query=lambda token, start: sys.maxsize),
)
_cached(
    "mask of the first chunk for each",
    "masks each chunk as if it were the first",
    _Cache(_in_place, query=lambda token, start: token - start),
)
