"""What a cache holds, and which tokens stand where in its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from llama_layers.arrays.brief import brief, megabytes
from llama_layers.arrays.checks import is_integer
from llama_layers.arrays.copies import DeepCopied
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.pytrees import STATIC
from llama_layers.arrays.tracing import known
from llama_layers.arrays.types import Array, ArrayT
from llama_layers.errors import shown
from llama_layers.layers.mask import slot_range


@dataclass(frozen=True, eq=False, init=False)
class CacheState(DeepCopied):
    """The fields of a `KVCache`, which its docstring describes, and what follows from them."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: int | Array
    max_len: int = field(metadata=STATIC)
    window: int | None = field(metadata=STATIC)
    rolling: int | None = field(metadata=STATIC)
    keep: Array | None
    counts: Array | None
    first: int | Array
    room: int = field(metadata=STATIC)

    def __init__(self, *_: object, **fields: object) -> None:
        raise TypeError(
            "KVCache: expected KVCache.create to make it, and its methods (extend, append, "
            "truncate, take, repeat, grow, copy) to change it"
        )

    def __repr__(self) -> str:
        return f"{brief(self)[:-1]}, {megabytes([*self.keys, *self.values])})"

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for."""
        return int(self.keys[0].shape[1])

    def most_at_once(self) -> int:
        """Return how many tokens fit at once: a ring must keep what the first of them sees."""
        if self.rolling is None or self.capacity == self.max_len:
            return self.max_len
        return self.rolling

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


C = TypeVar("C", bound=CacheState)


def changed(cache: C, **fields: Any) -> C:
    """A cache with other fields, which fit as the old ones did: nothing is checked again."""
    new = object.__new__(type(cache))
    vars(new).update(vars(cache) | fields)
    return new
