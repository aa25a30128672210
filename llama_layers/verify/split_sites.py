"""Sites that ranks have in parts, and which part each rank has.

Which arrays are split, and along which axis, follows from the table of sites: an axis whose size
grows with the number of heads, channels or tokens is one that ranks divide among them. How they
divide it is read off the sizes of their arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.sites import Site, sites
from llama_layers.model.padding import padding
from llama_layers.parallel.plan import Places, Shard
from llama_layers.verify.stated_config import stated_config
from llama_layers.verify.stored import StoredArray
from llama_layers.verify.trace import Trace


def splits(
    arrays: Mapping[str, Sequence[StoredArray]],
    known: Mapping[str, Site],
    config: LlamaConfig,
    extent: tuple[int, int],
) -> dict[str, Split]:
    """Return how each site is split whose arrays, one of each rank, are parts."""
    found, kinds = {}, _kinds(config)
    for name in arrays:
        if name not in kinds:
            continue
        kind, tokens = kinds[name], extent
        if kind == "tokens":
            shapes = [array.info().shape for array in arrays[name]]
            widths = [shape[-1] if shape else 0 for shape in shapes]
            if min(widths) >= config.vocab_size:
                continue  # each rank has those of all tokens
            whole = sum(widths)
            count = whole if padding(whole, config.vocab_size) else config.vocab_size
            tokens = extent[0], shapes[0][-2] if len(shapes[0]) > 1 else 1
        else:
            count = {
                "query_heads": config.num_attention_heads,
                "kv_heads": config.num_key_value_heads,
                "channels": config.intermediate_size,
            }[kind]
        found[name] = Split(known[name], kind, count, tokens, config.head_dim)
    return found


def _kinds(config: LlamaConfig) -> dict[str, str]:
    """Return what each site that can be split has parts of: what its size grows with."""
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    grown = {
        "query_heads": replace(config, num_attention_heads=2 * heads),
        "kv_heads": replace(config, num_attention_heads=2 * heads, num_key_value_heads=2 * keys),
        "channels": replace(config, intermediate_size=2 * config.intermediate_size),
        "tokens": replace(config, vocab_size=2 * config.vocab_size),
    }
    found: dict[str, str] = {}
    for kind, larger in grown.items():
        for site, other in zip(sites(config), sites(larger), strict=True):
            if site.shape != other.shape:
                found.setdefault(site.name, kind)
    return found


@dataclass(frozen=True)
class Split:
    """A site that ranks have in parts, its heads, channels or tokens as an axis of their own."""

    site: Site
    kind: str
    count: int
    extent: tuple[int, int]
    head_dim: int

    @property
    def axis(self) -> int:
        """Where heads, channels or tokens are."""
        return self.site.split_axis

    def shape(self, units: int) -> tuple[int, ...]:
        """The shape of some heads, channels or tokens."""
        batch, count = self.extent
        if self.site.pairwise:
            return batch, units, count, count
        width = (self.head_dim,) if self.kind.endswith("heads") else ()
        return batch, count, units, *width

    def unpadded(self, places: tuple[Places, ...]) -> tuple[Places, ...]:
        """The same places without those of padding, which is left out of logits."""
        tokens = self.site.shape[-1]
        if self.kind != "tokens" or not isinstance(tokens, int):
            return places
        return tuple(tuple(p for p in own if p is not None and p < tokens) for own in places)

    def part(self, rank: int, array: StoredArray) -> StoredArray:
        """What a rank has, with an axis of heads or channels."""
        shape, one = array.info().shape, self.shape(1)
        before = one[: self.axis]
        begins = [before, before[1:]] if before[0] == 1 else [before]
        units, rest = divmod(math.prod(shape), math.prod(one))
        if rest or not any(shape[: len(axes)] == axes for axes in begins):
            axes = ", ".join(map(str, self.site.shape))
            raise TraceError(
                f"rank {rank}: {self.site.name}: expected a part of shape [{axes}], where B is "
                f"{self.extent[0]} and S {self.extent[1]}, got {list(shape)}"
            )
        return array.changed(self.shape(units), partial(reshaped, self.shape(units)))

    def joined(
        self, parts: Sequence[StoredArray], places: tuple[Places, ...]
    ) -> tuple[StoredArray, dict[int, StoredArray]]:
        """The whole, and what it is with the numbers of each rank that differs from it."""
        ranks = list(range(len(parts)))
        for rank, part in enumerate(parts):
            if (dtype := part.info().dtype) != (expected := parts[0].info().dtype):
                raise TraceError(
                    f"rank {rank}: {self.site.name}: expected {expected}, as rank 0 has, "
                    f"got {dtype}"
                )
        whole = self._with(parts, places, ranks)
        if len([p for of_rank in places for p in of_rank if p is not None]) == self.count:
            return whole, {}
        numbers = reshaped(self.shape(self.count), whole.read())
        differing = {}
        for rank in ranks:
            theirs, own = _own(parts[rank].read(), places[rank], self.axis)
            if not equal(theirs, numbers.take(own, axis=self.axis)):
                order = [other for other in ranks if other != rank]
                differing[rank] = self._with(parts, places, [rank, *order])
        return whole, differing

    def _with(
        self, parts: Sequence[StoredArray], places: tuple[Places, ...], order: Sequence[int]
    ) -> StoredArray:
        """The whole; where several ranks have a place, with the numbers of the first."""
        reads = tuple((parts[rank].read, places[rank]) for rank in reversed(order))
        sizes = dict(zip("BS", self.extent, strict=True))
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.site.shape)
        if self.kind == "tokens":
            shape = self.shape(self.count)  # of which padding is left out later
        change = partial(_placed, reads, self.shape(self.count), self.axis, shape)
        return parts[0].changed(shape, change)


def _placed(
    reads: Sequence[tuple[Callable[[], Array], Places]],
    whole: tuple[int, ...],
    axis: int,
    shape: tuple[int, ...],
    first: Array,
) -> np.ndarray:
    """Put parts in their places, later ones over earlier ones; `first` tells the dtype."""
    result = np.zeros(whole, to_numpy(first).dtype)
    for read, places in reads:
        part, own = _own(read(), places, axis)
        result[(slice(None),) * axis + (own,)] = part
    return result.reshape(shape)


def _own(part: Array, places: Places, axis: int) -> tuple[np.ndarray, list[int]]:
    """A part without zeros, and the places of the rest."""
    kept = [i for i, place in enumerate(places) if place is not None]
    return to_numpy(part).take(kept, axis=axis), [place for place in places if place is not None]


def reshaped(shape: tuple[int, ...], array: Array) -> np.ndarray:
    """Return an array in another shape."""
    return to_numpy(array).reshape(shape)


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays have the same bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class Ways:
    """The ways in which ranks divide heads and channels."""

    def __init__(self, config: LlamaConfig, traces: Sequence[Trace]) -> None:
        self._group = config.num_attention_heads // config.num_key_value_heads
        shards = [Shard(config, rank, len(traces)) for rank in range(len(traces))]
        self._queries: tuple[Places, ...] = tuple(shard.query_heads for shard in shards)
        self._channels: tuple[Places, ...] = tuple(
            tuple(shard.channels) or (None,) for shard in shards
        )
        stated = [stated_config(trace.metadata) for trace in traces]
        self._ours = stated == [shard.config for shard in shards]

    def places(self, split: Split, units: list[int]) -> tuple[Places, ...]:
        """Which heads, channels or tokens each rank has, if that number is in its array."""
        count = split.count
        found: tuple[Places, ...] = ()
        ours = self._ours and split.kind != "tokens"
        if ours and split.kind != "kv_heads":
            found = self._queries if split.kind == "query_heads" else self._channels
        elif not ours and all(own == count for own in units):
            found = (tuple(range(count)),) * len(units)
        elif not ours and sum(units) == count:
            found = tuple(tuple(range(a, b)) for a, b in pairwise([0, *accumulate(units)]))
        elif split.kind == "kv_heads":
            found = tuple(map(self._keys_of, self._queries))
        if [len(places) for places in found] != units:
            hint = "is a rank's file missing?" if sum(units) < count else "does a rank come twice?"
            if split.kind == "kv_heads":
                hint = "is a rank's file missing, or are the ranks in another order?"
            raise TraceError(
                f"{split.site.name}: expected parts of {count} {split.kind.replace('_', ' ')}, "
                f"got {' + '.join(map(str, units))}: {hint}"
            )
        if split.kind == "query_heads":
            self._queries = found
        return found

    def _keys_of(self, queries: Places) -> Places:
        """The key heads that some query heads read."""
        return tuple(dict.fromkeys(q // self._group for q in queries if q is not None)) or (None,)
