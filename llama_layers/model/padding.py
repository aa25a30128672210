"""Embeddings and heads with rows below those of the tokens."""

from __future__ import annotations

from llama_layers.arrays.types import Array


def padding(rows: int, tokens: int) -> int:
    """How many of the rows are padding.

    Twice as many rows as tokens are another vocabulary's, unless a multiple of 64 is near.
    """
    more = rows - tokens
    rounded = rows % 64 == 0 and more < 512
    return more if more > 0 and (more < tokens or rounded) else 0


def without_padding(table: Array, tokens: int) -> Array:
    """The first rows of a table, one for each token."""
    padded = getattr(table, "ndim", None) == 2 and padding(table.shape[0], tokens)
    return table[:tokens, :] if padded else table
