"""The one extension point of the forward pass.

A tap is called with the name and the array of each site, and the forward pass continues with the
array that it returns. Recording, patching, looking for NaN and live comparison are all taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from llama_layers.arrays.checks import check_like
from llama_layers.arrays.types import ArrayT

# Any, since a user's tap may be for the arrays of one library.
TapFunction: TypeAlias = Callable[[str, Any], Any]
"""Takes the name and the array of a site, and returns an array that replaces it."""
Tap: TypeAlias = TapFunction | Mapping[str, TapFunction]
"""A function for every site but scores and probabilities, or functions by names of sites."""


def untouched(name: str, array: ArrayT) -> ArrayT:
    """The tap that does nothing."""
    return array


@dataclass(frozen=True)
class SiteTap:
    """A tap for the sites inside a module, whose results are checked."""

    everywhere: TapFunction | None
    """Called at each site, unless the array is made only for those who ask for it."""
    chosen: Mapping[str, list[TapFunction]]
    """By the full names of sites, called one after the other."""
    module: str = ""
    """What goes before a name inside the module."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the family calls modules inside a layer, where it has names of its own."""
    layer: str = ""
    """What goes before a name inside the layer."""

    def __call__(self, name: str, array: ArrayT) -> ArrayT:
        """Return the array that the forward pass continues with."""
        name = self._full(name)
        functions = self.chosen.get(name, ()) if self.everywhere is None else (self.everywhere,)
        for function in functions:
            result = function(name, array)
            check_like(f"tap at {name}", result, array)
            array = result
        return array

    def asks_for(self, name: str) -> bool:
        """Whether there is a function for a site by its name."""
        return self._full(name) in self.chosen

    def _full(self, name: str) -> str:
        """The whole name of a site inside the module."""
        role = (self.module + name).removeprefix(self.layer)
        return self.layer + self.names.get(role, role)


def checked(tap: Tap | None, sites_named: Callable[[str], Iterable[str]]) -> TapFunction:
    """The tap as the forward pass calls it.

    `sites_named` gives the sites that a key of a mapping names, or raises ValueError. A tap that
    was checked before is returned as it is.
    """
    if tap is None or tap is untouched:
        return untouched
    if isinstance(tap, SiteTap):
        return tap
    if not isinstance(tap, Mapping):
        if not callable(tap):
            raise TypeError(
                f"tap: expected a callable, a mapping of names of sites to callables, or None, "
                f"got {type(tap).__name__}"
            )
        return SiteTap(tap, {})
    chosen: dict[str, list[TapFunction]] = {}
    for key, function in tap.items():
        if not callable(function):
            raise TypeError(f"tap: expected a callable for {key!r}, got {type(function).__name__}")
        for name in sites_named(key):
            chosen.setdefault(name, []).append(function)
    return SiteTap(None, chosen) if chosen else untouched


def inside(tap: TapFunction, module: str) -> TapFunction:
    """The tap for the sites of a module, whose names are relative to it."""
    if not isinstance(tap, SiteTap):
        return untouched
    return replace(tap, module=f"{tap.module}{module}.")


def in_family(tap: TapFunction, names: Mapping[str, str]) -> TapFunction:
    """The tap of a layer, for a family that has names of its own for modules inside it."""
    if not isinstance(tap, SiteTap) or not names:
        return tap
    return replace(tap, names=names, layer=tap.module)


def asks_for(tap: TapFunction, *names: str) -> bool:
    """Whether a tap has a function for any of these sites by name."""
    return isinstance(tap, SiteTap) and any(map(tap.asks_for, names))
