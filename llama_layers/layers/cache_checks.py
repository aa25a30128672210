"""Checks of what the methods of a `KVCache` are given."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_layers.arrays.checks import is_integer
from llama_layers.arrays.dtypes import check_array, check_integers
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.tracing import is_traced, known_false
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import Array
from llama_layers.errors import shown


def checked_length(length: Any, most: int | Array) -> int | Array:
    """A number of tokens as Python's integer, or as the array that `jax.jit` traces."""
    if is_traced(length):
        return length
    try:
        if isinstance(length, bool):
            raise TypeError
        number = operator.index(length)
    except TypeError:
        raise TypeError(f"length: expected an integer, got {type(length).__name__}") from None
    if number < 0 or known_false(number <= most):
        upper = "" if is_traced(most) else f" to {int(most)}, that of the cache"
        raise ValueError(f"length: expected 0{upper}, got {shown(number)}")
    return number


def checked_rows(rows: Any, like: Array) -> Array:
    """Numbers of the sequences of an array [B, ...], from 0 on, in its library."""
    batch = like.shape[0]
    if isinstance(rows, Sequence):
        if rows and all(is_integer(row) and -batch <= row < batch for row in rows):
            wanted = [int(row) % batch for row in rows]
            return namespace(cache=like).asarray(wanted, device=device(like))
        try:
            rows = np.asarray(rows)
        except ValueError:  # lists of several lengths
            raise TypeError(f"rows: expected integers, got {shown(rows)}") from None
    check_array("rows", rows)
    xp = namespace(rows=rows)
    if rows.ndim != 1 or not rows.shape[0]:
        raise ValueError(f"rows: expected shape [n] with n > 0, got {list(rows.shape)}")
    check_integers("rows", rows)
    if not is_traced(rows):
        numbers = to_numpy(rows)  # torch has no least of a uint16
        lowest, highest = int(numbers.min()), int(numbers.max())
        if lowest < -batch or highest >= batch:
            raise ValueError(
                f"rows: expected numbers of sequences from {-batch} to {batch - 1}, got {lowest} "
                f"to {highest}"
            )
    rows = xp.astype(rows, xp.asarray(0).dtype)
    # Under `jax.jit` a row may be out of range still: then beyond the end, where there is NaN.
    rows = xp.where(rows < -batch, batch, xp.where(rows < 0, rows + batch, rows))
    if isinstance(rows, np.ndarray):
        rows = from_numpy(rows, namespace(cache=like), device(like))
    namespace(cache=like, rows=rows)
    return rows
