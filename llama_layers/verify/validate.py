"""Traces checked against the model they are of, and brought into its shapes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.families import FAMILIES, module_name
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.layers.mask import Mask
from llama_layers.layers.sites import LOGPROBS, Site, sites
from llama_layers.model.padding import padding
from llama_layers.parallel.plan import Places
from llama_layers.verify.aliases import canonical_arrays
from llama_layers.verify.fit import (
    HEADED,
    NORMED_KEYS,
    OF_CACHE,
    OF_LAST_TOKEN,
    OF_VOCABULARY,
    check_layout,
    fitted,
    without_padding,
)
from llama_layers.verify.logprob_arrays import NextIds, fitted_logprobs, next_tokens
from llama_layers.verify.past import KEY, Past, check_no_gap, keys_seen, past_of
from llama_layers.verify.ranks import parallel_profile
from llama_layers.verify.stated_config import check_stated_config
from llama_layers.verify.stored import StoredArray, StoredArrays, info_of, stored
from llama_layers.verify.tokens import beginning, ids_of, positions_of, valid_tokens
from llama_layers.verify.trace import Trace
from llama_layers.verify.unknown_names import check_names, only_sites

# The keys of a trace's metadata that are read; the rest is for people.
_READ = ("config", "dtype", "accumulate", "rope_layout", "weights", "temperature")


@dataclass(frozen=True, eq=False)
class Recorded:
    """A trace that fits its model."""

    arrays: Mapping[str, Array]  # by the name of their site
    config: LlamaConfig
    batch: int
    count: int  # of the tokens in each sequence
    input_ids: NDArray[np.int64] | None  # [B, S]
    positions: NDArray[np.int64]  # of the tokens, for RoPE: [S] or [B, S]
    positions_given: bool  # whether the trace has them
    keep: NDArray[np.bool_] | None  # which tokens are not padding, [B, S]
    metadata: Mapping[str, str]
    padding: int = 0  # logits of no token, from rows of padding in the head, which were left out
    parts: Mapping[str, Sequence[StoredArray]] = field(default_factory=dict)  # of sums, by rank
    places: Mapping[str, tuple[Places, ...]] = field(default_factory=dict)  # that each rank has
    rank: int | None = None  # whose places alone are judged; all if None
    past: Past = field(default_factory=Past)  # what attention sees of earlier tokens
    next_ids: NextIds | None = None  # whose log-probabilities were recorded, [B, S]; -1 for none

    def array(self, name: str) -> np.ndarray:
        """Return the array of a site, as NumPy's.

        Sums depend on the order in memory in their last bits, and files and pickles may change it.
        """
        return np.asarray(to_numpy(self.arrays[name]), order="C")

    def route(self, site: Site) -> tuple[str, ...] | None:
        """Return the recorded sites that a site can be recomputed from; None if one is missing."""
        if site.operation == "embedding":
            return None if self.input_ids is None else ()
        for route in site.routes:
            # Recorded probabilities may have keys of a past that was not recorded.
            fits = not (self.past.needed(site, route) and self.past.count(site.layer))
            if fits and all(name in self.arrays for name in route):
                return route
        return None

    @property
    def temperature(self) -> float:
        """What logits are divided by before log-probabilities are made of them."""
        return _temperature(self.metadata)

    def allowed(self, layer: int) -> NDArray[np.bool_]:
        """Return which keys each query of a layer may attend to, [B or 1, S, P + S]."""
        before = self.past.count(layer)
        queries, keys = before + np.arange(self.count), np.arange(before + self.count)
        keep = self.keep_with_past(before)
        rows = Mask(queries, keys, self.config.window_of(layer), keep).rows(0, self.count)
        return np.asarray(rows)

    def keep_with_past(self, before: int) -> NDArray[np.bool_] | None:
        """Return which keys are not padding, the last ones of the past first."""
        if self.keep is None and self.past.keep is None:
            return None
        every = [self.past.keep, self.keep]
        counts = [before, self.count]
        parts = [
            np.ones((self.batch, count), bool) if keep is None else keep[:, len(keep[0]) - count :]
            for keep, count in zip(every, counts, strict=True)
        ]
        return np.concatenate(parts, axis=1)


def first_tokens(recorded: Recorded, count: int) -> Recorded:
    """Return the first tokens of a trace; all if it is padded or holds last tokens only."""
    arrays = recorded.arrays
    shapes = [info_of(arrays, name).shape for name in OF_LAST_TOKEN if name in arrays]
    short = any(shape[1] < recorded.count for shape in shapes)
    if recorded.keep is not None or short or recorded.count <= count:
        return recorded
    return replace(
        recorded,
        arrays=StoredArrays({name: _first(stored(arrays, name), name, count) for name in arrays}),
        count=count,
        input_ids=None if recorded.input_ids is None else recorded.input_ids[:, :count],
        positions=recorded.positions[..., :count],
        next_ids=None if recorded.next_ids is None else recorded.next_ids[:, :count],
    )


def _first(array: StoredArray, name: str, count: int) -> StoredArray:
    """Return the first tokens of an array."""
    batch, second, *rest = array.info().shape
    if name.endswith(("self_attn.scores", "self_attn.probabilities")):
        keys = rest[1] - rest[0] + count  # with those of the past
        return array.changed((batch, second, count, keys), lambda a: a[:, :, :count, :keys])
    return array.changed((batch, count, *rest), lambda a: a[:, :count])


def validated(trace: Trace, config: LlamaConfig, past: Trace | None = None) -> Recorded:
    """Return a trace ready to be checked; raise TraceError if it cannot be one of the model.

    Earlier tokens may be in a trace of their own.
    """
    if not isinstance(trace, Trace):
        raise TypeError(f"trace: expected a Trace, got {type(trace).__name__}")
    check_stated_config(trace.metadata, config)
    _check_formats(trace.metadata)
    known = {site.name: site for site in sites(config)}
    if FAMILIES[config.model_type].modules:
        trace = replace(trace, arrays=canonical_arrays(trace.arrays, config.model_type))
    check_names(trace.arrays, config)
    given = trace.arrays
    trace = only_sites(trace, known)
    batch, count = extent(trace, known)
    if not batch or not count:
        raise TraceError(
            f"trace: expected at least one sequence of one token, got {batch} of {count}"
        )
    layout = trace.metadata.get("rope_layout", "half")
    check_layout(layout)
    before = Past(past_of(given, config, batch, layout))
    if past is not None:
        before = _past_in(past, config, batch, before, trace)
    longest = max((array.info().shape[1] for array in before.arrays.values()), default=0)
    keep, keep_past = valid_tokens(trace.attention_mask, batch, count, longest)
    before = replace(before, keep=before.keep if keep_past is None else keep_past)
    ids = ids_of(trace.input_ids, batch, count, config)
    positions = positions_of(trace.positions, keep, before.keep, batch, count, longest)
    if begins := beginning(positions, keep):
        before = replace(before, begins=begins, seen=keys_seen(trace.arrays, known, count))
    keys = {layer: before.count(layer) + count for layer in range(config.num_hidden_layers)}
    arrays = fitted(_without(trace.arrays, LOGPROBS), known, config, (batch, count), layout, keys)
    next_ids = next_tokens(trace.next_ids, ids, keep, (batch, count), config.vocab_size)
    if LOGPROBS in trace.arrays:
        found = without_padding(stored(trace.arrays, LOGPROBS), config.vocab_size)
        found, next_ids = fitted_logprobs(found, (batch, count), config.vocab_size, next_ids)
        _check_logits(arrays, found)
        arrays = StoredArrays({**arrays.stored, LOGPROBS: found})
    return Recorded(
        arrays,
        config,
        batch,
        count,
        ids,
        positions,
        trace.positions is not None,
        keep,
        trace.metadata,
        _padding(trace.arrays, config),
        past=before,
        next_ids=next_ids,
    )


def _past_in(past: Trace, config: LlamaConfig, batch: int, own: Past, trace: Trace) -> Past:
    """Return the keys and values of a trace of earlier tokens, and which are not padding."""
    if not isinstance(past, Trace):
        raise TypeError(f"past: expected a Trace, got {type(past).__name__}")
    if own.arrays:
        raise TraceError(
            "past: expected nothing, since the trace has keys and values of the past of its own"
        )
    try:
        found = validated(past, config)
    except TraceError as error:
        raise TraceError(f"past: {str(error).removeprefix('trace: ')}") from None
    if found.batch != batch:
        raise TraceError(f"past: expected {batch} sequences, as the trace has, got {found.batch}")
    if found.keep_with_past(0) is None and trace.attention_mask is None:
        check_no_gap(found.positions, trace.positions)
    heads = (config.num_key_value_heads, config.head_dim)
    arrays = {}
    for layer in range(config.num_hidden_layers):
        names = {role: f"model.layers.{layer}.{site}" for site, role in OF_CACHE.items()}
        if config.qk_norm_after_rope:
            names[KEY] = f"model.layers.{layer}.{module_name(config.model_type, NORMED_KEYS)}"
        if not all(name in found.arrays for name in names.values()) or found.past.lacks(layer):
            continue
        for role, name in names.items():
            shape = (batch, found.past.count(layer) + found.count, *heads)
            change = partial(_with_its_past, found.past, layer, role, (batch, -1, *heads))
            arrays[f"model.layers.{layer}.{role}"] = stored(found.arrays, name).changed(
                shape, change
            )
    if not arrays and found.past.begins:
        raise TraceError(
            f"past: expected a trace from the first token on, got one from position "
            f"{found.past.begins} on"
        )
    if not arrays:
        raise TraceError(
            "past: expected self_attn.k_rope and self_attn.v_proj of a layer, got none"
        )
    longest = max(array.info().shape[1] for array in arrays.values())
    return Past(arrays, found.keep_with_past(longest - found.count))


def _with_its_past(
    past: Past, layer: int, role: str, shape: tuple[int, ...], array: Array
) -> np.ndarray:
    return past.joined(layer, role, to_numpy(array).reshape(shape))


def _without(arrays: Mapping[str, Array], name: str) -> StoredArrays:
    return StoredArrays({other: stored(arrays, other) for other in arrays if other != name})


def _check_logits(arrays: StoredArrays, logprobs: StoredArray) -> None:
    """Raise TraceError if logits were recorded, and not of every token with a log-probability."""
    shape = logprobs.info().shape
    for name in OF_VOCABULARY:
        if name in arrays and info_of(arrays, name).shape[1] < shape[1]:
            raise TraceError(
                f"{name}: expected the logits of all {shape[1]} tokens beside their {LOGPROBS}, or "
                "none, got those of the last token only"
            )


def _padding(arrays: Mapping[str, Array], config: LlamaConfig) -> int:
    """Count the logits of each token that are beyond the vocabulary."""
    widths = [info_of(arrays, name).shape[-1] for name in OF_VOCABULARY if name in arrays]
    return max((padding(width, config.vocab_size) for width in widths), default=0)


def _check_formats(metadata: Mapping[str, str]) -> None:
    for key in metadata.keys() - _READ:
        close = difflib.get_close_matches(key.lower().replace("-", "_"), _READ, n=1, cutoff=0.75)
        if close:
            raise TraceError(f"metadata: expected keys such as {close[0]!r}, got {key!r}")
    _temperature(metadata)
    for key in ("dtype", "accumulate"):
        if metadata.get(key) not in (None, *FLOATS):
            raise TraceError(
                f"metadata {key}: expected one of {', '.join(FLOATS)}, got {metadata[key]!r}"
            )
    try:
        parallel_profile(metadata)
    except ValueError:
        raise TraceError(
            f"metadata tensor_parallel: expected a text such as '2 ranks, bfloat16 reduce', "
            f"got {metadata['tensor_parallel']!r}"
        ) from None


def _temperature(metadata: Mapping[str, str]) -> float:
    """Return what logits are divided by before log-probabilities are made of them."""
    said = metadata.get("temperature", "1")
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise TraceError(f"metadata temperature: expected a positive number, got {said!r}")
    return number


def extent(trace: Trace, known: Mapping[str, Site]) -> tuple[int, int]:
    """Return batch and sequence, from the ids or else the first array that has every token."""
    found = _extent_of_arrays(trace.arrays, known)
    if trace.input_ids is not None:
        shape = tuple(int(size) for size in trace.input_ids.shape)
        if len(shape) == 1 and (found is None or found[0] == 1):
            return 1, shape[0]
        if len(shape) != 2:
            raise TraceError(f"input_ids: expected shape [B, S], got {list(shape)}")
        return shape[0], shape[1]
    return found or _extent_of_last_tokens(trace)


def _extent_of_last_tokens(trace: Trace) -> tuple[int, int]:
    """Return batch and sequence where each array may hold the last token only.

    They are those of mask or positions, or else of the arrays.
    """
    given = [info_of(trace.arrays, name).shape for name in OF_LAST_TOKEN if name in trace.arrays]
    shapes = [(1, *shape) if len(shape) == 2 else shape for shape in given]
    if not all(len(shape) == 3 for shape in shapes) or not shapes:
        raise TraceError("input_ids: expected them, or an array that has every token, got neither")
    batch, count = shapes[0][0], max(shape[1] for shape in shapes)
    for tokens in (trace.attention_mask, trace.positions):
        if tokens is not None and len(tokens.shape):
            count = max(count, int(tokens.shape[-1]))
    return batch, count


def _extent_of_arrays(
    arrays: Mapping[str, Array], known: Mapping[str, Site]
) -> tuple[int, int] | None:
    """Return batch and sequence of the first array whose other sizes are those of its site."""
    given = [
        (known[name], info_of(arrays, name).shape)
        for name in arrays
        if name not in (*OF_LAST_TOKEN, LOGPROBS)
    ]
    for read in (_extent_as, _extent_by_last_axis):  # a site with a wrong size is refused later
        for site, shape in given:
            # Heads before tokens are refused later, too, and told from tokens before heads.
            for order in (site.shape, _heads_first(site)):
                for whole in (shape, (1, *shape)):
                    if len(whole) == len(order) and (found := read(order, whole)) is not None:
                        return found
    return None


def _extent_as(order: tuple[str | int, ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    if any(isinstance(a, int) and a != size for a, size in zip(order, shape, strict=True)):
        return None
    return shape[0], shape[order.index("S")]


def _extent_by_last_axis(
    order: tuple[str | int, ...], shape: tuple[int, ...]
) -> tuple[int, int] | None:
    return (shape[0], shape[order.index("S")]) if order[-1] in ("S", shape[-1]) else None


def _heads_first(site: Site) -> tuple[str | int, ...]:
    """Return the axes of a site with those of heads and tokens swapped, if it has both."""
    if site.role not in HEADED or len(site.shape) != 4:
        return site.shape
    batch, tokens, heads, width = site.shape
    return batch, heads, tokens, width
