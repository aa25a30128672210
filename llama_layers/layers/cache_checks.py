"""Checks that the fields of a `KVCache` fit each other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from array_api_compat import is_jax_array

from llama_layers.arrays.checks import (
    MOST_TOKENS,
    check_count,
    check_same_dtype,
    check_shape,
    is_integer,
)
from llama_layers.arrays.dtypes import check_bools, check_integers
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.tracing import is_traced, known_false
from llama_layers.arrays.types import Array
from llama_layers.errors import shown


def checked_fields(
    *,
    keys: Sequence[Array],
    values: Sequence[Array],
    length: int | Array,
    max_len: int,
    window: int | None,
    keep: Array | None,
    counts: Array | None,
    room: int,
) -> dict[str, Any]:
    """The fields of a cache as they are kept: sequences as tuples, NumPy's integers as Python's."""
    max_len = check_count("max_len", max_len, MOST_TOKENS)
    if window is not None:
        window = check_count("window", window)
    for name, arrays in (("keys", keys), ("values", values)):
        if not isinstance(arrays, Sequence):
            raise TypeError(f"{name}: expected a tuple of arrays, got {type(arrays).__name__}")
    keys, values = tuple(keys), tuple(values)
    _check_buffers(keys, values)
    _check_padding(keys[0], keep, counts)
    length = _checked_length(length, max_len)
    if not is_integer(room) or room < 0 or known_false(room <= length):
        raise ValueError(f"room: expected an integer from 0 to the length, got {shown(room)}")
    _check_capacity(int(keys[0].shape[1]), max_len, window)
    return {
        "keys": keys,
        "values": values,
        "length": length,
        "max_len": max_len,
        "window": window,
        "room": int(room),
    }


def _check_buffers(keys: tuple[Array, ...], values: tuple[Array, ...]) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(
            f"values: expected one for each of at least one layer's keys, got {len(keys)} keys "
            f"and {len(values)} values"
        )
    named = {
        f"{name}[{index}]": array
        for name, arrays in (("keys", keys), ("values", values))
        for index, array in enumerate(arrays)
    }
    namespace(**named)
    check_shape("keys[0]", keys[0], "B", "capacity", "num_kv_heads", "head_dim")
    for name, array in named.items():
        check_shape(name, array, *keys[0].shape)
    check_same_dtype(**named)


def _check_padding(keys: Array, keep: Array | None, counts: Array | None) -> None:
    if (keep is None) != (counts is None):
        raise ValueError("counts: expected with keep, and only with it")
    if keep is None or counts is None:
        return
    namespace(keys=keys, keep=keep, counts=counts)
    check_bools("keep", keep)
    check_integers("counts", counts)
    shape = tuple(keys.shape[:2])
    for name, array, expected in (("keep", keep, shape), ("counts", counts, shape[:1])):
        if tuple(array.shape) != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(array.shape)}")


def _checked_length(length: Any, max_len: int) -> int | Array:
    """The length as Python's integer, or as jax's array, which `jax.jit` may trace."""
    if is_traced(length):
        return length
    if type(length) is int and 0 <= length <= max_len:
        return length
    try:
        if isinstance(length, bool):
            raise TypeError
        number = operator.index(length)
    except TypeError:
        raise TypeError(f"length: expected an integer, got {type(length).__name__}") from None
    if not 0 <= number <= max_len:
        raise ValueError(f"length: expected 0 to max_len = {max_len}, got {shown(number)}")
    return length if is_jax_array(length) else number


def _check_capacity(capacity: int, max_len: int, window: int | None) -> None:
    """A ring has room for a window at least, other buffers for every token."""
    least = max_len if window is None else min(window, max_len)
    if capacity < least:
        reason = "of max_len" if window is None else "that the window sees"
        raise ValueError(
            f"keys: expected room for the {least} tokens {reason}, got capacity = {capacity}"
        )
