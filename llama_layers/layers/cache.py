"""The keys and values of the tokens that came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import device

from llama_layers.arrays.checks import MOST_TOKENS, check_count, is_integer
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import check_bools, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import host, is_traced
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import shown
from llama_layers.layers.cache_checks import checked_fields
from llama_layers.layers.mask import slots
from llama_layers.model.llama import Llama, check_model


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of every layer, in memory that is taken once.

    Each method returns the cache that is valid from then on; the one it was called on is not,
    though they may share memory: `copy` it first to go on from one prefix in two ways.

    Under a compiler (`jax.jit`) the length is not known, so that tokens beyond `max_len` cannot be
    refused: they overwrite the first ones, without a word. The caller must see to it that they
    fit.

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
        Which tokens are no padding; None if all are.
    counts : Array, shape [B], int32, or None
        How many tokens of each sequence are no padding; None if all are.
    room : int
        Tokens that `extend` last made room for, and `append` takes; 0 after a `forward`.

    Raises
    ------
    TypeError
        If an attribute is of another type, or an array comes from another library than the first.
    ValueError
        If the arrays do not fit each other, or a number is out of range.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    length: Any
    max_len: int
    window: int | None = None
    keep: Any | None = None
    counts: Any | None = None
    room: int = 0

    def __post_init__(self) -> None:
        for name, value in checked_fields(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def create(
        cls,
        model_or_config: Llama | LlamaConfig,
        batch: int,
        max_len: int,
        /,
        *,
        like: Any | None = None,
        rolling: int | None = None,
    ) -> KVCache:
        """Take the memory for a batch of sequences.

        Parameters
        ----------
        model_or_config : Llama or LlamaConfig
            What the keys and values are of.
        batch : int
            Sequences.
        max_len : int
            The longest that a sequence can become, padding included.
        like : Array, optional
            The cache is of this array's library, device and dtype; by default as the activations
            of the model, or float32 NumPy arrays for a config.
        rolling : int, optional
            Keep only what the sliding window of the config still sees, and room to append so
            many tokens at a time: memory for ``sliding_window + rolling - 1`` tokens in the place
            of `max_len`.

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
            like = host.zeros((), dtype="float32") if like is None else like
        else:
            check_model(model_or_config)
            config = model_or_config.config
            like = model_or_config.activations_like() if like is None else like
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
        make_traceable(
            xp, cls, ("keys", "values", "length", "keep", "counts"), ("max_len", "window", "room")
        )
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        keys, values = (
            tuple(
                xp.zeros(shape, dtype=like.dtype, device=device(like))
                for _ in range(config.num_hidden_layers)
            )
            for _ in range(2)
        )
        return cls(keys, values, 0, max_len, window)

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for."""
        return int(self.keys[0].shape[1])

    def extend(self, count: int, keep: Any | None = None, /) -> KVCache:
        """Make room for tokens, whose keys and values `append` then writes layer by layer.

        Parameters
        ----------
        count : int
            How many tokens.
        keep : Array, shape [B, count], bool, optional
            Which of them are no padding.

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
        if not is_traced(self.length) and int(self.length) + count > self.max_len:
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
        kept, counts = self.keep, self.counts
        if kept is None:
            kept = xp.ones((batch, self.capacity), dtype=xp.bool, device=where)
            counts = xp.zeros((batch,), dtype=xp.int32, device=where) + self.length
        if keep is None:
            keep = xp.ones((batch, count), dtype=xp.bool, device=where)
        check_bools("keep", keep)
        if tuple(keep.shape) != (batch, count):
            raise ValueError(f"keep: expected shape {[batch, count]}, got {list(keep.shape)}")
        new = xp.sum(xp.astype(keep, xp.int32), axis=1, dtype=xp.int32)
        kept = write_tokens(xp, kept, self.length, keep)
        return changed(longer, keep=kept, counts=counts + new)

    def copy(self) -> KVCache:
        """A cache of its own memory, to go on from the same tokens in two ways.

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
        """How many tokens may be appended at once: a ring must keep what the first of them sees."""
        if self.window is None or self.capacity == self.max_len:
            return self.max_len
        return self.capacity - self.window + 1

    def append(self, layer: int, k: Any, v: Any, /) -> KVCache:
        """Write the keys and values of the tokens that `extend` last made room for.

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

    def check_layer(self, layer: Any) -> None:
        """Refuse what is not the number of a layer."""
        if not is_integer(layer) or not 0 <= layer < len(self.keys):
            raise ValueError(
                f"layer: expected an integer from 0 to {len(self.keys) - 1}, got {shown(layer)}"
            )

    def visible(self, array: Any, /) -> Any:
        """The part of a buffer that tokens have reached; all of it where that is not known."""
        if is_traced(self.length):
            return array
        return array[:, : min(int(self.length), self.capacity), ...]

    def visible_keep(self) -> Any | None:
        """Which of the visible keys are no padding; None if all are."""
        return None if self.keep is None else self.visible(self.keep)

    def key_slots(self) -> Any:
        """The slot of each visible key, shape [T]."""
        xp = namespace(keys=self.keys[0])
        count = self.visible(self.keys[0]).shape[1]
        places = slots(xp, 0, count, self.keys[0])
        if self.window is None:
            return places
        # The ring holds at each place the latest slot that falls on it, or none yet.
        latest = self.length - 1 - (self.length - 1 - places) % self.capacity
        return xp.where(latest < 0, -xp.ones_like(latest), latest)


@portable
def write_tokens(xp: Any, buffer: Any, first: Any, block: Any) -> Any:
    """Write a block [B, S, ...] into a ring buffer [B, capacity, ...] from a slot on, in place."""
    capacity, count = buffer.shape[1], block.shape[1]
    place = int(first) % capacity
    before_end = min(count, capacity - place)
    buffer[:, place : place + before_end, ...] = block[:, :before_end, ...]
    if before_end < count:
        buffer[:, : count - before_end, ...] = block[:, before_end:, ...]
    return buffer


@portable
def make_traceable(
    xp: Any, cls: type, data_fields: tuple[str, ...], meta_fields: tuple[str, ...]
) -> None:
    """Tell a compiling library what in a dataclass is data; for most there is nothing to tell."""


def changed(cache: KVCache, **fields: Any) -> KVCache:
    """A cache with other fields, which fit as those before them did: nothing is checked again."""
    new = object.__new__(KVCache)
    vars(new).update(vars(cache) | fields)
    return new


def _replaced(arrays: tuple[Any, ...], index: int, array: Any) -> tuple[Any, ...]:
    return (*arrays[:index], array, *arrays[index + 1 :])


def _copied(array: Any | None) -> Any | None:
    return None if array is None else namespace(array=array).asarray(array, copy=True)
