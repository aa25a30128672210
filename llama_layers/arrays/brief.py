"""Objects that hold arrays, in a few words: dtypes and shapes, and no numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from llama_layers.arrays.dtypes import FLOATS, dtype_name


def brief(thing: Any) -> str:
    """The repr of a dataclass or named tuple, without the fields that are None."""
    pairs = (
        ((field.name, getattr(thing, field.name)) for field in fields(thing))
        if is_dataclass(thing)
        else thing._asdict().items()
    )
    said = (f"{name}={brief_value(value)}" for name, value in pairs if value is not None)
    return f"{type(thing).__name__}({', '.join(said)})"


def brief_value(value: Any) -> str:
    """The repr of a value; dtype and shape of an array."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{dtype_name(value.dtype)}{[*map(int, value.shape)]}"
    if type(value) in (tuple, list):
        items = [brief_value(item) for item in value]
        if len(items) > 1 and len(set(items)) == 1:
            return f"{len(items)} x {items[0]}"
        return f"[{', '.join(items)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {brief_value(v)}' for key, v in value.items())}}}"
    return repr(value)


def megabytes(arrays: Iterable[Any]) -> str:
    """The memory that arrays of floats take: 12.3 MB."""
    nbytes = sum(
        math.prod(array.shape) * FLOATS[dtype_name(array.dtype)].itemsize for array in arrays
    )
    return f"{nbytes / 1e6:.3g} MB"
