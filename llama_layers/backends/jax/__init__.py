"""Bodies for jax arrays, which cannot be written to and which `jax.jit` may trace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_layers.arrays.tracing import is_traced
from llama_layers.arrays.types import Array, Namespace
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.rope import rope_table

if TYPE_CHECKING:
    import jax


def write_tokens(
    xp: Namespace, buffer: jax.Array, first: int | jax.Array, block: jax.Array
) -> jax.Array:
    """Write a block [B, S, ...] into a ring buffer [B, capacity, ...] from a slot on."""
    places = (first + xp.arange(block.shape[1])) % buffer.shape[1]
    return buffer.at[:, places].set(block)


def angle_table(
    xp: Namespace, positions: Array, config: LlamaConfig, like: Array
) -> tuple[Array, Array]:
    """Take the rows of traced positions from the table of all positions of the config.

    Nobody can refuse positions that are not known yet, so those outside the table give NaN.
    """
    if not is_traced(positions):
        return NotImplemented
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        raise ValueError(
            "positions: expected known numbers for rope_type 'dynamic', whose frequencies depend "
            "on the largest, got traced ones"
        )
    every = np.arange(config.max_position_embeddings)
    rows = xp.where(positions < 0, len(every), positions)  # `take` would count from the end
    cos, sin = (xp.take(t, rows, axis=0) for t in rope_table(every, config, like=like))
    return cos, sin


@cache
def make_traceable(xp: Namespace, cls: type) -> None:
    """Make a dataclass a pytree, so that `jax.jit` takes and returns it."""
    import jax  # not at the top, so that this file can be imported where jax is not installed

    static = tuple(f.name for f in fields(cls) if f.metadata.get("static"))
    data = tuple(f.name for f in fields(cls) if f.name not in static)

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, n) for n in data], tuple(getattr(value, n) for n in static)

    def unflatten(numbers: tuple[Any, ...], arrays: Iterable[Any]) -> Any:
        # Not by __init__, which checks: jax puts other things than arrays into its trees.
        value: Any = object.__new__(cls)
        vars(value).update(zip(data + static, (*arrays, *numbers), strict=True))
        return value

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


BODIES = {
    "angle_table": angle_table,
    "make_traceable": make_traceable,
    "write_tokens": write_tokens,
}
ROUTES = {"jax": BODIES}
