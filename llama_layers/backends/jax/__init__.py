"""Bodies for jax arrays, which cannot be written to and may be traced."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any


def write_tokens(xp: Any, buffer: Any, first: Any, block: Any) -> Any:
    """Write a block [B, S, ...] into a ring buffer [B, capacity, ...] from a slot on."""
    places = (first + xp.arange(block.shape[1])) % buffer.shape[1]
    return buffer.at[:, places].set(block)


@cache
def _register(cls: type, data_fields: tuple[str, ...], meta_fields: tuple[str, ...]) -> None:
    import jax  # not at the top, so that this file can be imported where jax is not installed

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        data = [getattr(value, name) for name in data_fields]
        return data, tuple(getattr(value, name) for name in meta_fields)

    def unflatten(meta: tuple[Any, ...], data: Iterable[Any]) -> Any:
        # Not through __init__, which checks: jax puts other things than arrays into its trees.
        value: Any = object.__new__(cls)
        vars(value).update(zip(data_fields + meta_fields, (*data, *meta), strict=True))
        return value

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


def make_traceable(
    xp: Any, cls: type, data_fields: tuple[str, ...], meta_fields: tuple[str, ...]
) -> None:
    """Make a dataclass a pytree, so that jit takes and returns it."""
    _register(cls, data_fields, meta_fields)


BODIES = {"write_tokens": write_tokens, "make_traceable": make_traceable}
ROUTES = {"jax": BODIES}
