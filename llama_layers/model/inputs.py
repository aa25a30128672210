"""What a forward pass must know of its tokens: which they are, where they stand, what they see."""

from __future__ import annotations

from typing import Any

from array_api_compat import device

from llama_layers.arrays.dtypes import INTEGERS, dtype_name
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import is_traced
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.cache import KVCache
from llama_layers.layers.mask import Mask, slots


def check_cache(x: Any, config: LlamaConfig, cache: KVCache) -> None:
    """Refuse a cache that is not for the tokens of x [B, S, H] or not for this model.

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


def kept_tokens(x: Any, attention_mask: Any | None, past: Any) -> Any | None:
    """Which of the tokens of x [B, S, H] are no padding, as bool [B, S]; None if all are."""
    if attention_mask is None:
        return None
    xp = namespace(input_ids=x, attention_mask=attention_mask)
    kind = dtype_name(attention_mask.dtype)
    if kind != "bool" and kind not in INTEGERS:
        raise TypeError(f"attention_mask: expected bool or integers, got {kind}")
    batch, count = x.shape[:2]
    widths = {count} if is_traced(past) else {count, int(past) + count}
    if attention_mask.ndim != 2 or (
        attention_mask.shape[0] != batch or attention_mask.shape[1] not in widths
    ):
        expected = " or ".join(str([batch, width]) for width in sorted(widths))
        raise ValueError(
            f"attention_mask: expected shape {expected}, got {list(attention_mask.shape)}"
        )
    if kind != "bool":
        if not is_traced(attention_mask) and bool(
            xp.any((attention_mask != 0) & (attention_mask != 1))
        ):
            raise ValueError("attention_mask: expected 0 and 1 only")
        attention_mask = attention_mask != 0
    return attention_mask[:, -count:] if count else attention_mask[:, :0]


def token_positions(x: Any, keep: Any | None, cache: KVCache | None) -> Any:
    """The position of each token for RoPE, [S] or [B, S]: padding does not count."""
    xp, count = namespace(x=x), x.shape[1]
    if keep is None and (cache is None or cache.counts is None):
        return slots(xp, 0 if cache is None else cache.length, count, x)
    if keep is None:
        keep = xp.ones(x.shape[:2], dtype=xp.bool, device=device(x))
    counted = xp.cumulative_sum(xp.astype(keep, xp.int32), axis=1, dtype=xp.int32)
    if cache is not None:
        before = cache.length if cache.counts is None else xp.expand_dims(cache.counts, axis=1)
        counted = counted + before
    return xp.where(counted > 0, counted - 1, xp.zeros_like(counted))


def check_last(x: Any, keep: Any | None) -> None:
    """Refuse sequences without a token, or that end in padding, whose logits are of no use."""
    if not x.shape[1]:
        raise ValueError("last_only: expected at least one token, got none")
    if keep is None or is_traced(keep):
        return
    xp = namespace(attention_mask=keep)
    if bool(xp.any(xp.any(keep, axis=1) & ~keep[:, -1])):
        raise ValueError("last_only: expected prompts padded before their first token, not after")


def check_positions(x: Any, positions: Any) -> None:
    """Refuse positions of another library or shape than the tokens of x [B, S, H]."""
    namespace(input_ids=x, positions=positions)
    batch, count = x.shape[:2]
    if tuple(positions.shape) not in ((count,), (1, count), (batch, count)):
        raise ValueError(
            f"positions: expected shape {[count]} or {[batch, count]}, got {list(positions.shape)}"
        )


def layer_masks(
    x: Any, config: LlamaConfig, keep: Any | None, cache: KVCache | None
) -> dict[int | None, Mask]:
    """The mask for each attention window that the layers of a config have.

    The cache, where there is one, has been extended by the tokens of x [B, S, H] already.
    """
    xp, count = namespace(x=x), x.shape[1]
    if cache is None:
        queries = keys = slots(xp, 0, count, x)
    else:
        queries = slots(xp, cache.length - count, count, x)
        keys, keep = cache.key_slots(), cache.visible_keep()
    windows = {config.window_of(layer) for layer in range(config.num_hidden_layers)}
    return {window: Mask(queries, keys, window, keep) for window in windows}
