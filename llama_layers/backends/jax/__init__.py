"""Bodies for jax arrays, which cannot be written to and which `jax.jit` may trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_layers.arrays.types import Namespace
from llama_layers.backends.jax.rope import angle_table

if TYPE_CHECKING:
    import jax


def write_tokens(
    xp: Namespace, buffer: jax.Array, first: int | jax.Array, block: jax.Array
) -> jax.Array:
    """Write a block [B, S, ...] into a ring buffer [B, capacity, ...] from a slot on."""
    places = (first + xp.arange(block.shape[1])) % buffer.shape[1]
    return buffer.at[:, places].set(block)


BODIES = {"angle_table": angle_table, "write_tokens": write_tokens}
ROUTES = {"jax": BODIES}
