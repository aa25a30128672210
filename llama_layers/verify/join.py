"""Traces of ranks, each with a part of a model, joined to the trace of the whole model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.sites import sites
from llama_layers.parallel.plan import SUMMED, Places
from llama_layers.verify.fit import OF_VOCABULARY
from llama_layers.verify.partial_sums import looks_added, summed
from llama_layers.verify.split_sites import Ways, equal, splits
from llama_layers.verify.stated_config import stated_config
from llama_layers.verify.stored import TOKENS, StoredArray, StoredArrays, stored
from llama_layers.verify.trace import Trace
from llama_layers.verify.unknown_names import check_names
from llama_layers.verify.validate import Recorded, extent, validated

# What `check` reads in the metadata of a trace, beside the config.
_READ = ("dtype", "accumulate", "rope_layout", "weights", "tensor_parallel")


@dataclass(frozen=True, eq=False)
class JoinedTrace(Trace):
    """The trace of a whole model, from those of ranks.

    Attributes
    ----------
    places : mapping of str to tuple of tuple of int or None
        For each site that is split, which heads, channels or tokens each rank has.
    differing : mapping of str to mapping of int to StoredArray
        Where ranks have the same numbers and differ: the whole array as it is with those of a
        rank, for each rank that differs from the first that has them.
    parts : mapping of str to sequence of StoredArray
        Where arrays are sums of what ranks recorded: the array of each rank.
    size : int
        How many ranks there are.
    """

    places: Mapping[str, tuple[Places, ...]] = field(default_factory=dict)
    differing: Mapping[str, Mapping[int, StoredArray]] = field(default_factory=dict)
    parts: Mapping[str, Sequence[StoredArray]] = field(default_factory=dict)
    size: int = 1

    def of_rank(self, rank: int) -> Trace:
        """The trace with the numbers of a rank where ranks differ."""
        own = {name: found[rank] for name, found in self.differing.items() if rank in found}
        return self._with(own)

    def added(self, names: Iterable[str]) -> JoinedTrace:
        """The trace with the parts of some sites taken for what ranks had after they added them."""
        theirs = {name: self.parts[name] for name in names}
        return replace(
            self._with({name: of_ranks[0] for name, of_ranks in theirs.items()}),
            differing={
                **self.differing,
                **{name: _differing(name, of_ranks) for name, of_ranks in theirs.items()},
            },
            parts={name: self.parts[name] for name in self.parts.keys() - theirs},
        )

    def _with(self, others: Mapping[str, StoredArray]) -> JoinedTrace:
        """The trace with other arrays at some sites."""
        arrays = {name: stored(self.arrays, name) for name in self.arrays}
        return replace(self, arrays=StoredArrays({**arrays, **others}))


def join_ranks(traces: Iterable[Trace], config: LlamaConfig, /) -> JoinedTrace:
    """Join the traces of ranks that share a model (tensor parallelism).

    Sites that are split are put together: queries, keys, values, heads of attention, channels of
    the MLP, logits if each rank has those of some tokens. Key and value heads that several ranks
    have come once. What ``o_proj`` and ``down_proj`` give is added up in float64 if it was recorded
    before the ranks added it, and rounded to the dtype of the ranks. Every other site is the same
    on all ranks; logits may be on one of them only.

    Parameters
    ----------
    traces : iterable of Trace
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
    TypeError
        If `traces` has something else than traces, or `config` is of a wrong type.
    ValueError
        If there is no trace.
    TraceError
        If a rank lacks a site or has other tokens or metadata than rank 0, or the dtypes or sizes
        of the ranks' arrays cannot be those of parts of the model's.

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
    traces = _checked(traces)
    if not isinstance(config, LlamaConfig):
        raise TypeError(f"config: expected a LlamaConfig, got {type(config).__name__}")
    first = traces[0]
    known = {site.name: site for site in sites(config)}
    check_names(first.arrays, config)
    if unsplit := [name for name in first.arrays if name not in known]:
        raise TraceError(f"{unsplit[0]}: expected traces of ranks without a past, got one with it")
    metadata = _metadata(traces, config)
    for rank, trace in enumerate(traces):
        _check_same(rank, trace, first)
    by_site = {
        name: [stored(trace.arrays, name) for trace in traces if name in trace.arrays]
        for name in known
        if any(name in trace.arrays for trace in traces)
    }
    arrays: dict[str, StoredArray] = {}
    differing: dict[str, dict[int, StoredArray]] = {}
    places: dict[str, tuple[Places, ...]] = {}
    ways, split = Ways(config, traces), splits(by_site, known, config, extent(first, known))
    # Which key heads a rank has follows from its query heads.
    for name in sorted(split, key=lambda name: split[name].kind != "query_heads"):
        axis = split[name].axis
        of_ranks = [split[name].part(rank, array) for rank, array in enumerate(by_site[name])]
        places[name] = ways.places(split[name], [part.info().shape[axis] for part in of_ranks])
        arrays[name], differing[name] = split[name].joined(of_ranks, places[name])
        places[name] = split[name].unpadded(places[name])
    for name in by_site.keys() - split:
        arrays[name], differing[name] = by_site[name][0], _differing(name, by_site[name])
    parts: dict[str, Sequence[StoredArray]] = {}
    for role in SUMMED:
        of_role = {name: found for name, found in by_site.items() if known[name].role == role}
        if of_role and len(traces) > 1:  # which probably added in the dtype of their arrays
            dtype = next(iter(of_role.values()))[0].info().dtype
            metadata.setdefault("tensor_parallel", f"{len(traces)} ranks, {dtype} reduce")
        if any(differing[name] for name in of_role) and not looks_added(of_role.values()):
            parts |= of_role
    for name, recorded in parts.items():
        arrays[name], differing[name] = summed(recorded), {}
    return JoinedTrace(
        StoredArrays({name: arrays[name] for name in by_site}),
        **{name: getattr(first, name) for name in TOKENS},
        metadata=metadata,
        places=places,
        differing={name: others for name, others in differing.items() if others},
        parts=parts,
        size=len(traces),
    )


def _checked(traces: Iterable[Trace]) -> list[Trace]:
    """A list of traces."""
    expected = "traces: expected traces, one of each rank"
    if isinstance(traces, Trace | str) or not isinstance(traces, Iterable):
        raise TypeError(f"{expected}, got {type(traces).__name__}")
    found = list(traces)
    if not found:
        raise ValueError(f"{expected}, got none")
    for rank, trace in enumerate(found):
        if not isinstance(trace, Trace):
            hint = "; Trace.load opens a file" if isinstance(trace, str | os.PathLike) else ""
            raise TypeError(f"{expected}, got {type(trace).__name__} for rank {rank}{hint}")
    return found


def _check_same(rank: int, trace: Trace, first: Trace) -> None:
    """Raise TraceError unless a rank has the sites, the tokens and the formats of rank 0."""
    if missing := sorted((first.arrays.keys() ^ trace.arrays.keys()) - {*OF_VOCABULARY}):
        raise TraceError(f"rank {rank}: expected the sites of rank 0, {missing[0]} is in one only")
    for name in TOKENS:
        ours, theirs = getattr(first, name), getattr(trace, name)
        if ours is None and theirs is not None:
            raise TraceError(f"rank {rank}: expected no {name}, as on rank 0, got some")
        if ours is not None and theirs is None:
            raise TraceError(f"rank {rank}: expected the {name} of rank 0, got none")
        if ours is not None and not np.array_equal(to_numpy(ours), to_numpy(theirs)):
            raise TraceError(f"rank {rank}: expected the {name} of rank 0, got others")
    for key in _READ:
        if (found := trace.metadata.get(key)) != (expected := first.metadata.get(key)):
            raise TraceError(
                f"rank {rank}: metadata {key}: expected that of rank 0, {expected or 'none'}, "
                f"got {found or 'none'}"
            )


def _differing(name: str, arrays: Sequence[StoredArray]) -> dict[int, StoredArray]:
    """The arrays of ranks that differ from that of rank 0."""
    first, info, differing = to_numpy(arrays[0].read()), arrays[0].info(), {}
    for rank, array in enumerate(arrays):
        if array.info() != info:
            raise TraceError(
                f"rank {rank}: {name}: expected {info.dtype} in {list(info.shape)}, as rank 0 has, "
                f"got {array.info().dtype} in {list(array.info().shape)}"
            )
        if rank and not equal(first, to_numpy(array.read())):
            differing[rank] = array
    return differing


def recorded_by_ranks(trace: Trace, config: LlamaConfig, past: Trace | None = None) -> Recorded:
    """A trace that fits its model; a joined one with what its ranks have of it."""
    if not isinstance(trace, JoinedTrace):
        return validated(trace, config, past)
    if past is not None:
        raise ValueError("past: expected none for traces of ranks")
    return replace(validated(trace, config), parts=trace.parts, places=trace.places)


def _metadata(traces: Sequence[Trace], config: LlamaConfig) -> dict[str, str]:
    """The metadata of rank 0, of the whole model."""
    split = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    whole = {name: getattr(config, name) for name in split}
    stated = [stated_config(trace.metadata) for trace in traces]
    configs = [None if found is None else replace(found, **whole).to_json() for found in stated]
    for rank, found in enumerate(configs):
        if found != configs[0]:
            raise TraceError(f"rank {rank}: metadata config: expected that of rank 0, got another")
    metadata, count = dict(traces[0].metadata), len(traces)
    said = metadata.get("tensor_parallel", "")
    if count > 1 and said and not said.startswith(f"{count} ranks, "):
        raise TraceError(
            f"metadata tensor_parallel: expected {count} ranks, one for each trace, got {said}"
        )
    return metadata if configs[0] is None else metadata | {"config": json.dumps(configs[0])}
