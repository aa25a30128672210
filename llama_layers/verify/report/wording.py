"""Numbers and sites in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from llama_layers.layers.sites import Site

T = TypeVar("T")
K = TypeVar("K")


def figure(number: float) -> str:
    """Write a ratio or a difference in two digits: 0.41, 17, 1.2e+04; in more just above 1.

    A ratio just below 1 is not a near miss: a correctly rounded result comes as near as that.
    """
    if 0.995 <= number < 1:
        return "1.00"
    for digits in range(2, 17):
        text = f"{number:.{digits}g}"
        if text != "1":
            break
    return text


def apart(first: float, second: float) -> tuple[str, str]:
    """Write two numbers in as many digits as tell them apart, six at least."""
    for digits in range(6, 17):
        texts = f"{first:.{digits}g}", f"{second:.{digits}g}"
        if texts[0] != texts[1]:
            return texts
    return repr(first), repr(second)


def counted(number: int, what: str) -> str:
    """Write a number of things: 1 site, 2 sites."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def ended(sentence: str) -> str:
    """Put a full stop after a sentence that has no mark at its end."""
    return sentence if sentence.endswith("?") else f"{sentence}."


def listed(numbers: Sequence[object], most: int) -> str:
    """Write the first of some numbers: 0, 1, 2 ..."""
    return ", ".join(map(str, numbers[:most])) + (" ..." if len(numbers) > most else "")


def grouped(values: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group values by a key, in the order in which the keys first come."""
    groups: dict[K, list[T]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def role_name(role: str) -> str:
    """Name a role; the role "layer" is the layer's own output."""
    return "layer output" if role == "layer" else role


def roles_and_layers(sites: Iterable[Site]) -> str:
    """Name sites in few words: self_attn.q_rope in layers 0-3 and 7."""
    roles = grouped(sites, lambda site: site.inside)
    said = []
    for role, found in roles.items():
        layers = [site.layer for site in found if site.layer is not None]
        said.append(f"{role_name(role)} in {layer_ranges(layers)}" if layers else role_name(role))
    return ", ".join(said)


def layer_of(site: Site) -> str:
    """Write the layer of a site; nothing for a site outside the layers."""
    return "" if site.layer is None else str(site.layer)


def layer_ranges(layers: Iterable[int]) -> str:
    """Name layers in few words: layer 3, layers 0-3 and 7."""
    numbers = sorted(set(layers))
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    ranges = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    said = " and ".join(filter(None, (listed(ranges[:-1], 8), ranges[-1])))
    return f"{'layer' if len(numbers) == 1 else 'layers'} {said}"
