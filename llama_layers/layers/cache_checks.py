"""What the fields of a `KVCache` must be for its arrays to fit each other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from array_api_compat import is_jax_array

from llama_layers.arrays.checks import MOST_TOKENS, check_count, is_integer
from llama_layers.arrays.dtypes import check_bools, check_integers
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.shapes import check_same_dtype, check_shape
from llama_layers.arrays.transfer import is_traced
from llama_layers.errors import shown

if TYPE_CHECKING:
    from llama_layers.layers.cache import KVCache


def checked_fields(cache: KVCache) -> dict[str, Any]:
    """The fields of a cache as they are kept: sequences as tuples, NumPy's integers as Python's."""
    fields: dict[str, Any] = {"max_len": check_count("max_len", cache.max_len, MOST_TOKENS)}
    if cache.window is not None:
        fields["window"] = check_count("window", cache.window)
    for name in ("keys", "values"):
        if not isinstance(arrays := getattr(cache, name), Sequence):
            raise TypeError(f"{name}: expected a tuple of arrays, got {type(arrays).__name__}")
        fields[name] = tuple(arrays)
    _check_buffers(cache, fields["keys"], fields["values"])
    fields["length"] = _checked_length(cache.length, fields["max_len"])
    fields["room"] = _checked_room(cache.room, fields["length"])
    _check_capacity(int(cache.keys[0].shape[1]), fields["max_len"], fields.get("window"))
    return fields


def _check_buffers(cache: KVCache, keys: tuple[Any, ...], values: tuple[Any, ...]) -> None:
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
    namespace(**named, keep=cache.keep, counts=cache.counts)
    check_shape("keys[0]", keys[0], "B", "capacity", "num_kv_heads", "head_dim")
    for name, array in named.items():
        check_shape(name, array, *keys[0].shape)
    check_same_dtype(**named)
    if (cache.keep is None) != (cache.counts is None):
        raise ValueError("counts: expected with keep, and only with it")
    if cache.keep is None or cache.counts is None:
        return
    check_bools("keep", cache.keep)
    check_integers("counts", cache.counts)
    shape = tuple(keys[0].shape[:2])
    for name, array, expected in (("keep", cache.keep, shape), ("counts", cache.counts, shape[:1])):
        if tuple(array.shape) != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(array.shape)}")


def _checked_length(length: Any, max_len: int) -> Any:
    """The length as it is from `jax.jit`, an array, or as Python's integer."""
    if is_traced(length):
        return length
    try:
        if isinstance(length, bool):
            raise TypeError
        known = operator.index(length)
    except TypeError:
        raise TypeError(f"length: expected an integer, got {type(length).__name__}") from None
    if not 0 <= known <= max_len:
        raise ValueError(f"length: expected 0 to max_len = {max_len}, got {shown(known)}")
    return length if is_jax_array(length) else known


def _checked_room(room: Any, length: Any) -> int:
    if not is_integer(room) or room < 0 or not (is_traced(length) or room <= int(length)):
        raise ValueError(f"room: expected an integer from 0 to the length, got {shown(room)}")
    return int(room)


def _check_capacity(capacity: int, max_len: int, window: int | None) -> None:
    """A ring has room for a window at least, other buffers for every token."""
    least = max_len if window is None else min(window, max_len)
    if capacity < least:
        reason = "of max_len" if window is None else "that the window sees"
        raise ValueError(
            f"keys: expected room for the {least} tokens {reason}, got capacity = {capacity}"
        )
