"""Traces of ranks, each with a part of a model, joined to the trace of the whole model.

Which arrays are split, and along which axis, follows from the table of sites: an axis whose size
grows with the number of heads or channels is one that ranks divide among them. How they divide it
is read off the sizes of their arrays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.sites import Site, sites
from llama_layers.parallel.plan import SUMMED, Shard
from llama_layers.verify.distance import distance
from llama_layers.verify.roundoff import gamma
from llama_layers.verify.stored import TOKENS, StoredArray, StoredArrays, stored
from llama_layers.verify.trace import Trace
from llama_layers.verify.unknown_names import check_names
from llama_layers.verify.validate import Recorded, extent, stated_config, validated

# Which heads or channels of the whole a rank has; None for one of zeros.
Places = tuple[int | None, ...]
# Arrays that are farther apart than this are parts of a sum, and not the same sum twice.
_SAME = 0.1


@dataclass(frozen=True, eq=False)
class JoinedTrace(Trace):
    """The trace of a whole model, from those of ranks.

    Attributes
    ----------
    places : mapping of str to tuple of tuple of int or None
        For each site that is split, which heads or channels each rank has.
    differing : mapping of str to mapping of int to StoredArray
        Where ranks have the same numbers and differ: the whole array as it is with those of a
        rank, for each rank that differs from the first that has them.
    errors : mapping of str to StoredArray
        How far the sums of parts can be from what the ranks went on with.
    size : int
        How many ranks there are.
    """

    places: Mapping[str, tuple[Places, ...]] = field(default_factory=dict)
    differing: Mapping[str, Mapping[int, StoredArray]] = field(default_factory=dict)
    errors: Mapping[str, StoredArray] = field(default_factory=dict)
    size: int = 1

    def of_rank(self, rank: int) -> Trace:
        """The trace with the numbers of a rank where ranks differ."""
        own = {name: found[rank] for name, found in self.differing.items() if rank in found}
        arrays = {name: stored(self.arrays, name) for name in self.arrays}
        return replace(self, arrays=StoredArrays(arrays | own))


def join_ranks(traces: Sequence[Trace], config: LlamaConfig, /) -> JoinedTrace:
    """Join the traces of ranks that share a model (tensor parallelism).

    Sites that are split are put together: queries, keys, values, heads of attention, channels of
    the MLP. Key and value heads that several ranks have come once. What ``o_proj`` and
    ``down_proj`` give is added up in float64 if it was recorded before the ranks added it, and
    rounded to the dtype of the ranks. Every other site is the same on all ranks.

    Parameters
    ----------
    traces : sequence of Trace
        One of each rank, in their order.
    config : LlamaConfig
        The numbers of the whole model.

    Returns
    -------
    JoinedTrace
        The trace, whose arrays are read when they are used. `check` names the ranks that are wrong
        where they should have the same numbers and do not.

    Raises
    ------
    ValueError
        If there is no trace.
    TraceError
        If a rank lacks a site or has other tokens than rank 0, or the sizes of the ranks' arrays
        cannot be parts of the model's.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.verify import Trace, join_ranks
    >>> parts = np.zeros((2, 1, 3, 768), np.float32)  # of 1536 channels
    >>> ids = np.array([[1, 2, 3]])
    >>> traces = [Trace({"model.layers.0.mlp.act": part}, ids) for part in parts]
    >>> join_ranks(traces, LlamaConfig.smollm2_135m()).arrays["model.layers.0.mlp.act"].shape
    (1, 3, 1536)
    """
    if not traces:
        raise ValueError("traces: expected one of each rank, got none")
    first = traces[0]
    known = {site.name: site for site in sites(config)}
    check_names(first.arrays, config)
    if unsplit := [name for name in first.arrays if name not in known]:
        raise TraceError(f"{unsplit[0]}: expected traces of ranks without a past, got one with it")
    for rank, trace in enumerate(traces):
        _check_same(rank, trace, first)
    kinds, ways = _kinds(config), _Ways(config, traces)
    batch, count = extent(first, known)
    found = {
        name: _Split(known[name], kinds[name], (batch, count), config)
        for name in first.arrays
        if name in kinds
    }
    arrays: dict[str, StoredArray] = {}
    differing: dict[str, dict[int, StoredArray]] = {}
    places: dict[str, tuple[Places, ...]] = {}
    errors: dict[str, StoredArray] = {}
    metadata = _metadata(traces, config)
    # Which key heads a rank has follows from its query heads.
    for name, split in sorted(found.items(), key=lambda item: item[1].kind != "query_heads"):
        of_ranks = [
            split.part(rank, stored(trace.arrays, name)) for rank, trace in enumerate(traces)
        ]
        places[name] = ways.places(split, [part.info().shape[split.axis] for part in of_ranks])
        arrays[name], differing[name] = split.joined(of_ranks, places[name])
    for name in first.arrays.keys() - found:
        of_ranks = [stored(trace.arrays, name) for trace in traces]
        differing[name] = _differing(name, of_ranks)
        arrays[name] = of_ranks[0]
        if known[name].role in SUMMED and _are_parts(of_ranks[0], differing[name].values()):
            differing[name] = {}
            shape, reads = of_ranks[0].info().shape, tuple(array.read for array in of_ranks)
            arrays[name] = of_ranks[0].changed(shape, partial(_sum, reads))
            errors[name] = of_ranks[0].changed(shape, partial(_sum_error, reads))
            said = f"{len(traces)} ranks, {of_ranks[0].info().dtype} reduce"
            metadata.setdefault("tensor_parallel", said)
    return JoinedTrace(
        StoredArrays({name: arrays[name] for name in first.arrays}),
        **{name: getattr(first, name) for name in TOKENS},
        metadata=metadata,
        places=places,
        differing={name: others for name, others in differing.items() if others},
        errors=errors,
        size=len(traces),
    )


def _check_same(rank: int, trace: Trace, first: Trace) -> None:
    """Raise TraceError unless a rank has the sites and the tokens of rank 0."""
    if missing := sorted(first.arrays.keys() ^ trace.arrays.keys()):
        raise TraceError(f"rank {rank}: expected the sites of rank 0, {missing[0]} is in one only")
    for name in TOKENS:
        ours, theirs = getattr(first, name), getattr(trace, name)
        if (ours is None) != (theirs is None) or (
            ours is not None and not np.array_equal(to_numpy(ours), to_numpy(theirs))
        ):
            raise TraceError(f"rank {rank}: expected the {name} of rank 0, got others")


def _kinds(config: LlamaConfig) -> dict[str, str]:
    """For each site that can be split, what of: what its size grows with."""
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    grown = {
        "query_heads": replace(config, num_attention_heads=2 * heads),
        "kv_heads": replace(config, num_attention_heads=2 * heads, num_key_value_heads=2 * keys),
        "channels": replace(config, intermediate_size=2 * config.intermediate_size),
    }
    kinds: dict[str, str] = {}
    for kind, larger in grown.items():
        for site, other in zip(sites(config), sites(larger), strict=True):
            if site.shape != other.shape:
                kinds.setdefault(site.name, kind)
    return kinds


@dataclass(frozen=True)
class _Split:
    """A site that ranks have in parts, its heads or channels as an axis of their own."""

    site: Site
    kind: str
    extent: tuple[int, int]
    config: LlamaConfig

    @property
    def count(self) -> int:
        """How many heads or channels the whole has."""
        return {
            "query_heads": self.config.num_attention_heads,
            "kv_heads": self.config.num_key_value_heads,
            "channels": self.config.intermediate_size,
        }[self.kind]

    @property
    def axis(self) -> int:
        """Where heads or channels are."""
        return 1 if self.site.pairwise else 2

    def shape(self, units: int) -> tuple[int, ...]:
        """The shape of some heads or channels."""
        batch, count = self.extent
        if self.site.pairwise:
            return batch, units, count, count
        width = () if self.kind == "channels" else (self.config.head_dim,)
        return batch, count, units, *width

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
        return array.changed(self.shape(units), partial(_reshaped, self.shape(units)))

    def joined(
        self, parts: Sequence[StoredArray], places: tuple[Places, ...]
    ) -> tuple[StoredArray, dict[int, StoredArray]]:
        """The whole, and what it is with the numbers of each rank that differs from it."""
        ranks = list(range(len(parts)))
        whole = self._with(parts, places, ranks)
        if len([p for of_rank in places for p in of_rank if p is not None]) == self.count:
            return whole, {}
        numbers = _reshaped(self.shape(self.count), whole.read())
        differing = {}
        for rank in ranks:
            theirs, own = _own(parts[rank].read(), places[rank], self.axis)
            if not _equal(theirs, numbers.take(own, axis=self.axis)):
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


def _reshaped(shape: tuple[int, ...], array: Array) -> np.ndarray:
    return to_numpy(array).reshape(shape)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class _Ways:
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

    def places(self, split: _Split, units: list[int]) -> tuple[Places, ...]:
        """Which heads or channels each rank has, if that number is in its array."""
        count = split.count
        found: tuple[Places, ...] = ()
        if self._ours and split.kind != "kv_heads":
            found = self._queries if split.kind == "query_heads" else self._channels
        elif not self._ours and all(own == count for own in units):
            found = (tuple(range(count)),) * len(units)
        elif not self._ours and sum(units) == count:
            found = tuple(tuple(range(a, b)) for a, b in pairwise([0, *accumulate(units)]))
        elif split.kind == "kv_heads":
            found = tuple(map(self._keys_of, self._queries))
        if [len(places) for places in found] != units:
            raise TraceError(
                f"{split.site.name}: expected parts of {count} {split.kind.replace('_', ' ')}, "
                f"got {' + '.join(map(str, units))}"
            )
        if split.kind == "query_heads":
            self._queries = found
        return found

    def _keys_of(self, queries: Places) -> Places:
        """The key heads that some query heads read."""
        return tuple(dict.fromkeys(q // self._group for q in queries if q is not None)) or (None,)


def _differing(name: str, arrays: Sequence[StoredArray]) -> dict[int, StoredArray]:
    """The arrays of ranks that differ from that of rank 0."""
    first, info, differing = to_numpy(arrays[0].read()), arrays[0].info(), {}
    for rank, array in enumerate(arrays):
        if array.info() != info:
            raise TraceError(
                f"rank {rank}: {name}: expected {info.dtype} in {list(info.shape)}, as rank 0 has, "
                f"got {array.info().dtype} in {list(array.info().shape)}"
            )
        if rank and not _equal(first, to_numpy(array.read())):
            differing[rank] = array
    return differing


def _are_parts(first: StoredArray, others: Iterable[StoredArray]) -> bool:
    """Whether arrays are parts of a sum, and not the sum, with roundings of its own on a rank."""
    exact = to_numpy(first.read()).astype(np.float64)
    return any(not distance(exact, to_numpy(other.read())) < _SAME for other in others)


def _sum(reads: Sequence[Callable[[], Array]], first: Array) -> np.ndarray:
    """The sum of all ranks' arrays, rounded to their dtype."""
    total = sum(to_numpy(read()).astype(np.float64) for read in reads)
    with np.errstate(over="ignore"):
        return np.asarray(total).astype(to_numpy(first).dtype)


def _sum_error(reads: Sequence[Callable[[], Array]], first: Array) -> np.ndarray:
    """How far their sum can be from one that ranks added in their dtype, in any order."""
    form = FLOATS[dtype_name(to_numpy(first).dtype)]
    size = sum(np.abs(to_numpy(read()).astype(np.float64)) for read in reads)
    grown = gamma(len(reads) + 1, form.unit_roundoff)  # and the rounding of `_sum`
    return np.asarray(grown * size + 2 * len(reads) * form.smallest_subnormal)


def recorded_by_ranks(trace: Trace, config: LlamaConfig, past: Trace | None = None) -> Recorded:
    """A trace that fits its model; a joined one with the errors of its sums."""
    if not isinstance(trace, JoinedTrace):
        return validated(trace, config, past)
    if past is not None:
        raise ValueError("past: expected none for traces of ranks")
    return replace(validated(trace, config), errors=trace.errors)


def _metadata(traces: Sequence[Trace], config: LlamaConfig) -> dict[str, str]:
    """The metadata of rank 0, of the whole model and with what ranks add."""
    metadata = dict(traces[0].metadata)
    if (stated := stated_config(metadata)) is not None:
        whole = {
            name: getattr(config, name)
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        }
        metadata["config"] = json.dumps(replace(stated, **whole).to_json())
    return metadata
