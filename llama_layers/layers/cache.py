"""Keys and values of earlier tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama_layers.arrays.checks import MOST_TOKENS, check_count, is_integer
from llama_layers.arrays.dtypes import check_bools, float_format
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.pytrees import traceable, unchecked
from llama_layers.arrays.tracing import is_traced, known, known_false
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import shown
from llama_layers.layers.cache_buffers import (
    Model,
    capacity_for,
    empty_fields,
    lengthened,
    write_tokens,
)
from llama_layers.layers.cache_checks import checked_length, checked_rows
from llama_layers.layers.cache_state import CacheState, changed


@traceable
@dataclass(frozen=True, eq=False, init=False, repr=False)
class KVCache(CacheState):
    """Keys and values of every layer, in memory that is taken once.

    `create` makes one, `forward` or `extend` and `append` fill it, and `truncate`, `take`,
    `repeat`, `grow` and `copy` change it. Its attributes belong together, so neither a constructor
    nor ``dataclasses.replace`` takes them.

    Each method returns the cache that is valid from then on. The one it was called on is not, and
    they may share memory. Only `copy`, `take` and `repeat` return new arrays and leave both valid.

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
    rolling : int or None
        Tokens that a ring takes at a time; set where `window` is.
    keep : Array, shape [B, capacity], bool, or None
        Which tokens are valid, that is not padding; None if all are.
    counts : Array, shape [B], int32, or None
        How many tokens of each sequence are valid; None if all are.
    first : int
        The first token that the buffers still hold; more than 0 where a ring has overwritten some.
        Under `jax.jit` an array.
    room : int
        Tokens that `extend` last made room for, and `append` takes; 0 after a `forward`.

    Raises
    ------
    TypeError
        If it is made in another way than by `create`.
    """

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
        fields = empty_fields(model_or_config, batch, max_len, like, rolling)
        cache: KVCache = unchecked(cls, **fields)
        return cache

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
        length, first = self.length + count, self.first
        if self.window is not None:
            first = _later(first, length - self.capacity, self.keys[0])
        longer = changed(self, length=length, first=first, room=count)
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

    def truncate(self, length: int | Array, /) -> KVCache:
        """Keep the first tokens of every sequence and forget the others.

        A ring can forget the last `rolling` of the tokens that it has ever seen.

        Parameters
        ----------
        length : int
            How many stay, padding included.

        Returns
        -------
        KVCache
            The valid cache, in the memory of this one.

        Raises
        ------
        TypeError
            If `length` is not an integer.
        ValueError
            If it is not from 0 to the length of the cache, or a ring has overwritten keys that the
            next token would see. Under `jax.jit` this is not noticed.

        Examples
        --------
        >>> from llama_layers import KVCache, LlamaConfig
        >>> cache = KVCache.create(LlamaConfig.smollm2_135m(), 1, 16).extend(5)
        >>> cache.truncate(3).length
        3
        """
        length, counts = checked_length(length, self.length), self.counts
        if known(length) == 0:
            none = None if counts is None else 0 * counts
            return changed(self, length=length, counts=none, first=0, room=0)
        if self.window is not None:
            least = self.first + self.window - 1
            if known_false((self.first == 0) | (length >= least)):
                raise ValueError(
                    f"length: expected at least {least}, or 0, since the ring has overwritten "
                    f"earlier tokens, which the next one would see, got {shown(int(length))}"
                )
        if self.keep is not None:
            xp, slots = namespace(cache=self.keep), self.key_slots()
            gone = self.visible(self.keep) & (slots >= length) & (slots < self.length)
            counts = counts - xp.sum(xp.astype(gone, xp.int32), axis=1, dtype=xp.int32)
        return changed(self, length=length, counts=counts, room=0)

    def take(self, rows: Sequence[int] | Array, /) -> KVCache:
        """Select, reorder or duplicate sequences.

        Parameters
        ----------
        rows : sequence of int, or Array, shape [n], an integer dtype
            The numbers of the sequences, as for ``numpy.take``: negative ones count from the last.

        Returns
        -------
        KVCache
            With n sequences, in arrays of its own; this one stays valid.

        Raises
        ------
        TypeError
            If `rows` are not integers. A mask of bools is refused: take the rows where it is true.
        ValueError
            If there are none, or one is out of range. Under `jax.jit` such a row gives NaN.

        Examples
        --------
        >>> from llama_layers import KVCache, LlamaConfig
        >>> cache = KVCache.create(LlamaConfig.smollm2_135m(), 3, 16)
        >>> cache.take([2, 0, 0, 1]).keys[0].shape
        (4, 16, 3, 64)
        """
        xp, numbers = namespace(cache=self.keys[0]), checked_rows(rows, self.keys[0])
        return _with_arrays(self, lambda array: xp.take(array, numbers, axis=0))

    def repeat(self, n: int, /) -> KVCache:
        """Repeat each sequence, the copies next to each other, as ``numpy.repeat`` does.

        Parameters
        ----------
        n : int
            How often.

        Returns
        -------
        KVCache
            With n times the sequences, in arrays of its own; this one stays valid.

        Raises
        ------
        ValueError
            If `n` is not a positive integer.
        """
        times, batch = check_count("n", n), self.keys[0].shape[0]
        return self.take([row for row in range(batch) for _ in range(times)])

    def grow(self, max_len: int, /) -> KVCache:
        """Make room for longer sequences. A ring keeps its window and its tokens at a time.

        Parameters
        ----------
        max_len : int
            The longest that a sequence can become, padding included.

        Returns
        -------
        KVCache
            The valid cache, with the same tokens.

        Raises
        ------
        ValueError
            If `max_len` is not an integer, or less than that of the cache.
        """
        max_len = check_count("max_len", max_len, MOST_TOKENS)
        if max_len < self.max_len:
            raise ValueError(
                f"max_len: expected at least that of the cache, {self.max_len}, got {max_len}"
            )
        # If there is more memory to take, no token was overwritten yet: all stand in order.
        more = capacity_for(max_len, self.window, self.rolling) - self.capacity
        if not more:
            return changed(self, max_len=max_len)
        longer = _with_arrays(changed(self, counts=None), lambda array: lengthened(array, more))
        return changed(longer, max_len=max_len, counts=self.counts)

    def copy(self) -> KVCache:
        """Copy the cache, to continue the same tokens in two ways.

        Returns
        -------
        KVCache
            With the same tokens; neither changes the other.
        """
        return _with_arrays(self, lambda array: namespace(array=array).asarray(array, copy=True))

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


def _replaced(arrays: tuple[Array, ...], index: int, array: Array) -> tuple[Array, ...]:
    return (*arrays[:index], array, *arrays[index + 1 :])


def _with_arrays(cache: KVCache, function: Callable[[Array], Array]) -> KVCache:
    """A cache with what a function makes of each array."""
    return changed(
        cache,
        keys=tuple(map(function, cache.keys)),
        values=tuple(map(function, cache.values)),
        keep=None if cache.keep is None else function(cache.keep),
        counts=None if cache.counts is None else function(cache.counts),
    )


def _later(first: int | Array, other: int | Array, like: Array) -> int | Array:
    """The greater of two slots, which a compiler may trace."""
    return namespace(cache=like).maximum(first, other) if is_traced(other) else max(first, other)
