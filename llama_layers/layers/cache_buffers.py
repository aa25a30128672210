"""The memory of a cache: taken, written and made longer."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from llama_layers.arrays.checks import MOST_TOKENS, check_count
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import float_format
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.tracing import is_recorded
from llama_layers.arrays.types import Array, ArrayT, Namespace
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.mask import slot_range


@runtime_checkable
class Model(Protocol):
    """What a cache needs to know of a model: `Llama` knows it."""

    @property
    def config(self) -> LlamaConfig:
        """The numbers of the model."""

    def activations_like(self) -> Array:
        """Give an array of the library, device and dtype of the activations."""


def empty_fields(
    model_or_config: Model | LlamaConfig,
    batch: int,
    max_len: int,
    like: Array | None,
    rolling: int | None,
) -> dict[str, Any]:
    """The fields of a cache without tokens, from the arguments of `KVCache.create`."""
    if isinstance(model_or_config, LlamaConfig):
        config = model_or_config
        like = np.zeros((), np.float32) if like is None else like
    elif isinstance(model_or_config, Model):
        config = model_or_config.config
        like = model_or_config.activations_like() if like is None else like
    else:
        raise TypeError(
            f"model_or_config: expected a Llama, as load gives it, or a LlamaConfig, "
            f"got {type(model_or_config).__name__}"
        )
    batch = check_count("batch", batch, MOST_TOKENS)
    max_len = check_count("max_len", max_len, MOST_TOKENS)
    window = None
    if rolling is not None:
        rolling = check_count("rolling", rolling)
        window = config.sliding_window
        if window is None or "full_attention" in (config.layer_types or ()):
            raise ValueError("rolling: expected a config with a sliding window on every layer")
    xp = namespace(like=like)
    float_format("like", like)
    capacity = capacity_for(max_len, window, rolling)
    shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
    layers, where = range(config.num_hidden_layers), device(like)
    return {
        "keys": tuple(xp.zeros(shape, dtype=like.dtype, device=where) for _ in layers),
        "values": tuple(xp.zeros(shape, dtype=like.dtype, device=where) for _ in layers),
        "length": 0,
        "max_len": max_len,
        "window": window,
        "rolling": rolling,
        "keep": None,
        "counts": None,
        "first": 0,
        "room": 0,
    }


def capacity_for(max_len: int, window: int | None, rolling: int | None) -> int:
    """Tokens to have memory for: all, or those that any of the last `rolling` tokens sees."""
    if window is None or rolling is None:
        return max_len
    return min(max_len, window + rolling - 1)


@portable
def write_tokens(xp: Namespace, buffer: ArrayT, first: int | Array, block: Array) -> ArrayT:
    """Write a block [B, S, ...] into a ring buffer [B, capacity, ...] from a slot on.

    In place, unless a gradient needs the buffer as it was.
    """
    capacity, count = buffer.shape[1], block.shape[1]
    if count and (is_recorded(buffer) or is_recorded(block)):
        return _written_copy(xp, buffer, first, block)
    place = int(first) % capacity
    before_end = min(count, capacity - place)
    buffer[:, place : place + before_end, ...] = block[:, :before_end, ...]
    if before_end < count:
        buffer[:, : count - before_end, ...] = block[:, before_end:, ...]
    return buffer


def _written_copy(xp: Namespace, buffer: ArrayT, first: int | Array, block: Array) -> ArrayT:
    """The same in a new array."""
    capacity, count = buffer.shape[1], block.shape[1]
    row = (slot_range(xp, 0, capacity, buffer) - first) % capacity
    written = xp.reshape(row < count, (1, capacity, *(1 for _ in buffer.shape[2:])))
    rows = xp.take(block, xp.where(row < count, row, xp.zeros_like(row)), axis=1)
    return xp.where(written, rows, buffer)


def lengthened(buffer: Array, more: int) -> Array:
    """A buffer [B, capacity, ...] with room for more tokens after those that it holds."""
    xp = namespace(buffer=buffer)
    shape = (buffer.shape[0], more, *buffer.shape[2:])
    room = xp.zeros(shape, dtype=buffer.dtype, device=device(buffer))
    return xp.concat([buffer, room], axis=1)
