"""What the layers must know of the tokens besides their hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llama_layers.arrays.brief import brief
from llama_layers.arrays.dtypes import INTEGERS, check_bools, dtype_name
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.tracing import known, known_false
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_layers import RopeKind
from llama_layers.layers.cache import KVCache
from llama_layers.layers.mask import Mask, slot_range
from llama_layers.layers.rope import rope_table
from llama_layers.layers.temperature import query_temperature


class Inputs(NamedTuple):
    """Where tokens stand, and which other tokens they see: the same for all layers."""

    positions: Array
    """Array [S], [1, S] or [B, S] of integers, for RoPE."""
    ropes: Mapping[RopeKind | None, tuple[Array, ...] | None]
    """Cosines and sines of the positions, for each kind of RoPE that the layers have.

    The factors of queries are the third where a config has a temperature.
    """
    masks: Mapping[int | None, Mask | Array]
    """For each attention window that the layers of the model have; arrays are [1 or B, S, T]."""
    cache: KVCache | None
    """Already extended by the tokens."""

    def __repr__(self) -> str:
        return brief(self)

    @classmethod
    def of(
        cls,
        x: Array,
        config: LlamaConfig,
        cache: KVCache | None = None,
        positions: Array | None = None,
        attention_mask: Array | None = None,
        *,
        mask: Mask | Array | None = None,
        last_only: bool = False,
    ) -> Inputs:
        """Gather it from the arguments of `forward`, for the embedded tokens x [B, S, H].

        The cache is left as it is if an argument is wrong.
        """
        if cache is not None:
            _check_cache(x, config, cache)
        valid = _valid_tokens(x, attention_mask, cache)
        if mask is not None:
            _check_mask(x, mask, valid, cache)
        if last_only:
            _check_last(x, valid)
        if positions is None:
            positions = _token_positions(x, valid, cache)
        _check_positions(x, positions)
        ropes = {
            kind: None if kind is None else _rope(positions, config, kind, x)
            for kind in set(config.rope_kinds)
        }
        if cache is not None:
            cache = cache.extend(x.shape[1], valid)
        return cls(positions, ropes, _masks(x, config, mask, valid, cache), cache)


def _rope(positions: Array, config: LlamaConfig, kind: RopeKind, x: Array) -> tuple[Array, ...]:
    table = rope_table(positions, config.with_rope(kind), like=x)
    if not config.llama_4_scaling_beta:
        return table
    return (*table, query_temperature(positions, config, like=x))


def _valid_tokens(x: Array, attention_mask: Array | None, cache: KVCache | None) -> Array | None:
    """Which tokens are not padding, as bool [B, S]; None if all are valid."""
    if attention_mask is None:
        return None
    xp = namespace(input_ids=x, attention_mask=attention_mask)
    kind = dtype_name(attention_mask.dtype)
    if kind != "bool" and kind not in INTEGERS:
        raise TypeError(f"attention_mask: expected bool or integers, got {kind}")
    batch, count = x.shape[:2]
    past = 0 if cache is None else known(cache.length)
    widths = {count} if past is None else {count, past + count}
    if tuple(attention_mask.shape) not in {(batch, width) for width in widths}:
        expected = " or ".join(str([batch, width]) for width in sorted(widths))
        raise ValueError(
            f"attention_mask: expected shape {expected}, got {list(attention_mask.shape)}"
        )
    if kind != "bool":
        if known_false(xp.all((attention_mask == 0) | (attention_mask == 1))):
            raise ValueError("attention_mask: expected 0 and 1 only")
        attention_mask = attention_mask != 0
    return attention_mask[:, attention_mask.shape[1] - count :]


def _token_positions(x: Array, valid: Array | None, cache: KVCache | None) -> Array:
    """The position of each token, [S] or [B, S]: padding does not count."""
    xp, count = namespace(x=x), x.shape[1]
    if valid is None and (cache is None or cache.counts is None):
        return slot_range(xp, 0 if cache is None else cache.length, count, x)
    if valid is None:
        valid = xp.ones(x.shape[:2], dtype=xp.bool, device=device(x))
    counted = xp.cumulative_sum(xp.astype(valid, xp.int32), axis=1, dtype=xp.int32)
    if cache is not None:
        before = cache.length if cache.counts is None else xp.expand_dims(cache.counts, axis=1)
        counted = counted + before
    return xp.where(counted > 0, counted - 1, xp.zeros_like(counted))


def _masks(
    x: Array,
    config: LlamaConfig,
    given: Mask | Array | None,
    valid: Array | None,
    cache: KVCache | None,
) -> Mapping[int | None, Mask | Array]:
    """The mask for each window; the cache has been extended already."""
    xp, count = namespace(x=x), x.shape[1]
    windows = {config.window_of(layer) for layer in range(config.num_hidden_layers)}
    if isinstance(given, Mask):
        # With a cache a body may make the masks by itself, unless they are arrays.
        return dict.fromkeys(windows, given if cache is None else given.rows(0, count))
    if cache is None:
        queries = keys = slot_range(xp, 0, count, x)
    else:
        queries = slot_range(xp, cache.length - count, count, x)
        keys, valid = cache.key_slots(), cache.visible_keep()
    causal = {window: Mask(queries, keys, window, valid) for window in windows}
    if given is None:
        return causal
    rule = given
    if cache is not None:
        exists = (keys >= 0) & (keys < cache.length)
        rule = xp.take(given, xp.where(exists, keys, xp.zeros_like(keys)), axis=-1) & exists
    return {window: mask.with_rule(rule) for window, mask in causal.items()}


def _check_cache(x: Array, config: LlamaConfig, cache: KVCache) -> None:
    """Raise unless a cache is for this model and for a batch of this size.

    Its arrays are looked at each time: their shapes can be changed in place.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    namespace(input_ids=x, cache=cache.keys[0])
    if len(cache.keys) != config.num_hidden_layers:
        raise ValueError(
            f"cache: expected {config.num_hidden_layers} layers, got {len(cache.keys)}"
        )
    heads = (config.num_key_value_heads, config.head_dim)
    expected = (x.shape[0], *cache.keys[0].shape[1:2], *heads)
    for name, arrays in (("keys", cache.keys), ("values", cache.values)):
        for array in arrays:
            if tuple(array.shape) != expected:
                raise ValueError(
                    f"cache: expected {name} of shape {list(expected)}, got {list(array.shape)}"
                )
            if array.dtype != x.dtype and dtype_name(array.dtype) != dtype_name(x.dtype):
                raise TypeError(
                    f"cache: expected the dtype of the activations, {dtype_name(x.dtype)}, "
                    f"got {dtype_name(array.dtype)}"
                )
    if cache.window is not None and cache.capacity < cache.max_len:
        windows = {config.window_of(layer) for layer in range(config.num_hidden_layers)}
        longest = None if None in windows else max(w for w in windows if w is not None)
        if longest is None or longest > cache.window:
            sees = "every token" if longest is None else f"{longest} tokens"
            raise ValueError(
                f"cache: expected to hold all that the layers see, {sees}, got a ring for a window "
                f"of {cache.window}"
            )


def _check_mask(x: Array, mask: Mask | Array, valid: Array | None, cache: KVCache | None) -> None:
    """Raise unless a mask is for these tokens after those of a cache."""
    batch, count = x.shape[:2]
    most = count if cache is None else cache.max_len
    past = 0 if cache is None else known(cache.length)
    total = most if past is None else past + count  # under `jax.jit` all places are visible
    if isinstance(mask, Mask):
        mask.check(x, total if cache is None else min(total, cache.capacity))
        if valid is not None:
            raise ValueError(
                "mask: expected an array together with attention_mask, got a Mask, which says by "
                "itself which tokens are valid (keep)"
            )
        if cache is not None and cache.keep is not None and mask.keep is None:
            raise ValueError(
                "mask: expected a Mask with keep, since the cache holds padding, got one without"
            )
        return
    namespace(input_ids=x, mask=mask)
    check_bools("mask", mask)
    shapes = {(*first, count, n) for n in (total, most) for first in ((), (1,), (batch,))}
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"mask: expected shape {[count, total]} or {[batch, count, total]}, "
            f"got {list(mask.shape)}"
        )


def _check_last(x: Array, valid: Array | None) -> None:
    """Raise unless every sequence ends in a valid token, whose logits are of use."""
    if not x.shape[1]:
        raise ValueError("last_only: expected at least one token, got none")
    if valid is None:
        return
    xp = namespace(attention_mask=valid)
    if known_false(xp.all(~xp.any(valid, axis=1) | valid[:, -1])):
        raise ValueError("last_only: expected prompts padded before their first token, not after")


def _check_positions(x: Array, positions: Array) -> None:
    namespace(input_ids=x, positions=positions)
    batch, count = x.shape[:2]
    if tuple(positions.shape) not in ((count,), (1, count), (batch, count)):
        raise ValueError(
            f"positions: expected shape {[count]} or {[batch, count]}, got {list(positions.shape)}"
        )
