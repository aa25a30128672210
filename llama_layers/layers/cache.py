"""Keys and values of earlier tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from array_api_compat import device

from llama_layers.arrays.brief import brief, megabytes
from llama_layers.arrays.checks import MOST_TOKENS, check_count, is_integer
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import check_bools, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.tracing import known, known_false
from llama_layers.arrays.types import Array, ArrayT, Namespace
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import shown
from llama_layers.layers.cache_checks import checked_fields
from llama_layers.layers.mask import slot_range

# Marks fields that are numbers while `jax.jit` compiles; the others are arrays of unknown numbers.
STATIC = {"static": True}


@runtime_checkable
class Model(Protocol):
    """What a cache needs to know of a model: `Llama` knows it."""

    @property
    def config(self) -> LlamaConfig:
        """The numbers of the model."""

    def activations_like(self) -> Array:
        """Give an array of the library, device and dtype of the activations."""


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of every layer, in memory that is taken once.

    Each method returns the cache that is valid from then on. The one it was called on is not, and
    they may share memory: `copy` it first to continue one prefix in two ways.

    Under `jax.jit` the length is not known, so that tokens beyond `max_len` are not refused: they
    overwrite the first ones silently. The caller must see to it that they fit.

    Attributes
    ----------
    keys, values : tuple of Array, shape [B, capacity, num_kv_heads, head_dim]
        One of each for every layer; zeros where no token has come yet.
    length : int
        Tokens seen so far, padding included. Under `jax.jit` an array.
    max_len : int
        Tokens that may be seen.
    window : int or None
        Where set, the buffers hold the last `capacity` tokens only, in a ring.
    keep : Array, shape [B, capacity], bool, or None
        Which tokens are valid, that is not padding; None if all are.
    counts : Array, shape [B], int32, or None
        How many tokens of each sequence are valid; None if all are.
    room : int
        Tokens that `extend` last made room for, and `append` takes; 0 after a `forward`.

    Raises
    ------
    TypeError
        If an attribute is of another type, or an array comes from another library than the first.
    ValueError
        If the arrays do not fit each other, or a number is out of range.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: int | Array
    max_len: int = field(metadata=STATIC)
    window: int | None = field(default=None, metadata=STATIC)
    keep: Array | None = None
    counts: Array | None = None
    room: int = field(default=0, metadata=STATIC)

    def __post_init__(self) -> None:
        for name, value in checked_fields(**vars(self)).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"{brief(self)[:-1]}, {megabytes([*self.keys, *self.values])})"

    @classmethod
    def create(
        cls,
        model_or_config: Model | LlamaConfig,
        batch: int,
        max_len: int,
        /,
        *,
        like: Array | None = None,
        rolling: int | None = None,
    ) -> KVCache:
        """Take the memory for a batch of sequences.

        Parameters
        ----------
        model_or_config : Llama or LlamaConfig
            The model that the keys and values belong to, or its config.
        batch : int
            Sequences.
        max_len : int
            The longest that a sequence can become, padding included.
        like : Array, optional
            Gives the library, device and dtype of the cache; by default those of the activations
            of the model, or float32 NumPy arrays for a config.
        rolling : int, optional
            Keep only what the sliding window of the config still sees, and room to append this
            many tokens at a time: memory for ``sliding_window + rolling - 1`` tokens instead of
            `max_len`.

        Returns
        -------
        KVCache
            With no token in it.

        Raises
        ------
        TypeError
            If the first argument is neither a model nor a config, or `like` is not an array of
            floats.
        ValueError
            If a count is not positive, or `rolling` is given and a layer has no window.

        Examples
        --------
        >>> from llama_layers import KVCache, LlamaConfig
        >>> cache = KVCache.create(LlamaConfig.smollm2_135m(), 1, 16)
        >>> len(cache.keys), cache.keys[0].shape, cache.length
        (30, (1, 16, 3, 64), 0)
        """
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
        capacity = max_len = check_count("max_len", max_len, MOST_TOKENS)
        window = None
        if rolling is not None:
            rolling = check_count("rolling", rolling)
            window = config.sliding_window
            if window is None or "full_attention" in (config.layer_types or ()):
                raise ValueError("rolling: expected a config with a sliding window on every layer")
            capacity = min(max_len, window + rolling - 1)
        xp = namespace(like=like)
        float_format("like", like)
        make_traceable(xp, cls)
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        layers, where = range(config.num_hidden_layers), device(like)
        keys = tuple(xp.zeros(shape, dtype=like.dtype, device=where) for _ in layers)
        values = tuple(xp.zeros(shape, dtype=like.dtype, device=where) for _ in layers)
        return cls(keys, values, 0, max_len, window)

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for."""
        return int(self.keys[0].shape[1])

    def extend(self, count: int, keep: Array | None = None, /) -> KVCache:
        """Make room for tokens, once for all layers; `append` then writes each layer's.

        Parameters
        ----------
        count : int
            How many tokens.
        keep : Array, shape [B, count], bool, optional
            Which of them are valid tokens, not padding.

        Returns
        -------
        KVCache
            The valid cache, longer by `count`.

        Raises
        ------
        TypeError, ValueError
            If they do not fit, or `count` or `keep` is not as above; nothing is written then.
        """
        if not is_integer(count) or count < 0:
            raise ValueError(f"count: expected an integer from 0 on, got {shown(count)}")
        count = int(count)
        if known_false(self.length + count <= self.max_len):
            raise ValueError(
                f"cache: expected room for {shown(int(self.length) + count)} tokens, got max_len = "
                f"{self.max_len}"
            )
        if count > (most := self.most_at_once()):
            raise ValueError(f"cache: expected at most {most} tokens at a time, got {count}")
        longer = changed(self, length=self.length + count, room=count)
        if keep is None and self.keep is None:
            return longer
        xp = namespace(cache=self.keys[0], keep=keep)
        batch, where = self.keys[0].shape[0], device(self.keys[0])
        if keep is None:
            keep = xp.ones((batch, count), dtype=xp.bool, device=where)
        check_bools("keep", keep)
        if tuple(keep.shape) != (batch, count):
            raise ValueError(f"keep: expected shape {[batch, count]}, got {list(keep.shape)}")
        before, counts = self.keep, self.counts
        if before is None:
            before = xp.ones((batch, self.capacity), dtype=xp.bool, device=where)
            counts = xp.zeros((batch,), dtype=xp.int32, device=where) + self.length
        new = xp.sum(xp.astype(keep, xp.int32), axis=1, dtype=xp.int32)
        kept = write_tokens(xp, before, self.length, keep)
        return changed(longer, keep=kept, counts=counts + new)

    def without_room(self) -> KVCache:
        """Close the cache after all layers have appended: the next tokens need an `extend`."""
        return changed(self, room=0)

    def copy(self) -> KVCache:
        """Copy the cache, to continue the same tokens in two ways.

        Returns
        -------
        KVCache
            With the same tokens; neither changes the other.
        """
        return changed(
            self,
            keys=tuple(map(_copied, self.keys)),
            values=tuple(map(_copied, self.values)),
            keep=_copied(self.keep),
            counts=_copied(self.counts),
        )

    def most_at_once(self) -> int:
        """Return how many tokens fit at once: a ring must keep what the first of them sees."""
        if self.window is None or self.capacity == self.max_len:
            return self.max_len
        return self.capacity - self.window + 1

    def append(self, layer: int, k: Array, v: Array, /) -> KVCache:
        """Write a layer's keys and values of the tokens that `extend` last made room for.

        Parameters
        ----------
        layer : int
            Whose they are.
        k, v : Array, shape [B, S, num_kv_heads, head_dim]
            Keys after RoPE, and values, in the dtype of the cache.

        Returns
        -------
        KVCache
            The valid cache.

        Raises
        ------
        TypeError, ValueError
            If library, device, dtype or shape are not those of the cache, it was not extended by
            S tokens last, or there is no such layer; nothing is written then.
        """
        self.check_layer(layer)
        xp = namespace(cache=self.keys[layer], k=k, v=v)
        batch, _, heads, width = self.keys[layer].shape
        shape, form = (batch, self.room, heads, width), float_format("cache", self.keys[layer])
        for name, array in (("k", k), ("v", v)):
            found = float_format(name, array)
            if tuple(array.shape) != shape:
                raise ValueError(
                    f"{name}: expected shape {list(shape)}, for the {self.room} tokens that the "
                    f"cache was last extended by, got {list(array.shape)}"
                )
            if found is not form:
                raise TypeError(
                    f"{name}: expected the dtype of the cache, {form.name}, got {found.name}"
                )
        first = self.length - k.shape[1]
        return changed(
            self,
            keys=_replaced(self.keys, layer, write_tokens(xp, self.keys[layer], first, k)),
            values=_replaced(self.values, layer, write_tokens(xp, self.values[layer], first, v)),
        )

    def check_layer(self, layer: int) -> None:
        """Raise ValueError unless `layer` is the number of a layer."""
        if not is_integer(layer) or not 0 <= layer < len(self.keys):
            raise ValueError(
                f"layer: expected an integer from 0 to {len(self.keys) - 1}, got {shown(layer)}"
            )

    def visible(self, array: ArrayT, /) -> ArrayT:
        """Return the part of a buffer that tokens have reached; all of it under `jax.jit`."""
        length = known(self.length)
        return array if length is None else array[:, : min(length, self.capacity), ...]

    def visible_keep(self) -> Array | None:
        """Tell which of the visible keys are valid tokens; None if all are."""
        return None if self.keep is None else self.visible(self.keep)

    def key_slots(self) -> Array:
        """Return the slot of each visible key, shape [T]."""
        xp = namespace(keys=self.keys[0])
        count = self.visible(self.keys[0]).shape[1]
        places = slot_range(xp, 0, count, self.keys[0])
        if self.window is None:
            return places
        # Each place of the ring holds the latest slot that falls on it, or none yet.
        latest = self.length - 1 - (self.length - 1 - places) % self.capacity
        return xp.where(latest < 0, -xp.ones_like(latest), latest)


@portable
def write_tokens(xp: Namespace, buffer: ArrayT, first: int | Array, block: Array) -> ArrayT:
    """Write a block [B, S, ...] into a ring buffer [B, capacity, ...] from a slot on, in place."""
    capacity, count = buffer.shape[1], block.shape[1]
    place = int(first) % capacity
    before_end = min(count, capacity - place)
    buffer[:, place : place + before_end, ...] = block[:, :before_end, ...]
    if before_end < count:
        buffer[:, : count - before_end, ...] = block[:, before_end:, ...]
    return buffer


@portable
def make_traceable(xp: Namespace, cls: type) -> None:
    """Let a library compile functions of a dataclass, some of whose fields are `STATIC`."""


class LayerCache:
    """One layer's view of a `KVCache`, which it replaces with each append.

    Parameters
    ----------
    cache : KVCache
        The cache as it is before the layer: already extended by the new tokens, with
        `KVCache.extend`, once for all layers.
    layer : int
        Which layer.

    Raises
    ------
    TypeError
        If `cache` is not a KVCache.
    ValueError
        If it has no such layer.
    """

    def __init__(self, cache: KVCache, layer: int) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
        cache.check_layer(layer)
        self.cache = cache
        self.layer = layer

    def append(self, k: Array, v: Array, /) -> tuple[Array, Array]:
        """Write new keys and values, and return all that are visible now."""
        self.cache = self.cache.append(self.layer, k, v)
        return (
            self.cache.visible(self.cache.keys[self.layer]),
            self.cache.visible(self.cache.values[self.layer]),
        )


def changed(cache: KVCache, **fields: Any) -> KVCache:
    """A cache with other fields, which fit as the old ones did: nothing is checked again."""
    new = object.__new__(KVCache)
    vars(new).update(vars(cache) | fields)
    return new


def _replaced(arrays: tuple[Array, ...], index: int, array: Array) -> tuple[Array, ...]:
    return (*arrays[:index], array, *arrays[index + 1 :])


def _copied(array: Array | None) -> Array | None:
    return None if array is None else namespace(array=array).asarray(array, copy=True)
