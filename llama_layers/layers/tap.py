"""The one extension point of the forward pass.

A tap is called with the name and the array of each site, and the forward pass continues with the
array that it returns. Recording, patching, looking for NaN and live comparison are all taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_layers.arrays.types import ArrayT

# Any, since a user's tap may be for the arrays of one library.
Tap = Callable[[str, Any], Any]


def untouched(name: str, array: ArrayT) -> ArrayT:
    """The tap that does nothing."""
    return array


def checked(tap: Tap | None) -> Tap:
    """The tap, which now raises unless it returns an array of the same shape and dtype."""
    if tap is None or tap is untouched:
        return untouched
    if not callable(tap):
        raise TypeError(f"tap: expected a callable or None, got {type(tap).__name__}")

    def call(name: str, array: ArrayT) -> ArrayT:
        result = tap(name, array)
        expected = tuple(array.shape), array.dtype
        found = tuple(getattr(result, "shape", ())), getattr(result, "dtype", None)
        if found != expected:
            got = f"{list(found[0])}, {found[1]}" if found[1] else type(result).__name__
            raise ValueError(
                f"tap at {name}: expected an array of shape and dtype {list(expected[0])}, "
                f"{expected[1]}, got {got}"
            )
        return result

    return call


def inside(tap: Tap, module: str) -> Tap:
    """The tap for the sites of a module, whose names are relative to it."""
    if tap is untouched:
        return untouched
    return lambda name, array: tap(f"{module}.{name}", array)
