"""A place in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.extent import LISTED, Marginal

# Sizes of blocks that kernels work on, the largest first.
_TILES = (128, 64, 32, 16)


def words(
    told: Sequence[Marginal],
    few: Sequence[Marginal],
    elements: Sequence[Sequence[int]],
    shared: int,
    width: int,
    *,
    local: bool,
) -> str:
    """Say where wrong elements are: "head 8 only".

    Parameters
    ----------
    told : sequence of Marginal
        Along which axes, from the first to the last.
    few : sequence of Marginal
        Those of them along which wrong elements are few.
    elements : sequence of sequences of int
        The elements themselves, if they are few and lie apart.
    shared : int
        How many heads share keys and values; 1 if they share none here.
    width : int
        How wide a head is.
    local : bool
        Whether the errors stand out from those elsewhere.

    Returns
    -------
    str
        Without a full stop.
    """
    if elements:
        where = f"elements {', '.join(map(str, elements))} only"
    elif few:
        where = ", ".join((f"{', '.join(_few(told, few))} only", *_most(told, few)))
    else:
        return ", ".join(_most(told, few)) or "all over the array"
    if not local:
        return f"{where}; errors elsewhere are not much smaller"
    guesses = dict.fromkeys(guess for m in few for guess in _guesses(m, shared, width))
    alike = [] if elements else list(guesses)
    return f"{where}: {' and '.join(alike)}?" if alike else where


def _few(told: Sequence[Marginal], few: Sequence[Marginal]) -> Iterator[str]:
    """Say which positions have wrong elements, for each axis where few do."""
    names, fewer = ({m.extent.axis for m in axes} for axes in (told, few))
    for m in few:
        each = m.extent.axis == "channel" and "head" in names - fewer
        yield _positions(m) + (" of each head" if each else "")


def _most(told: Sequence[Marginal], few: Sequence[Marginal]) -> Iterator[str]:
    """Say which positions have wrong elements, for each axis where most but not all do."""
    for m in told:
        if m in few:
            continue
        if m.restricted and len(m.others) <= LISTED and len(m.others) < m.extent.count:
            yield f"every {m.extent.axis} but {_joined(m.others)}"
        elif m.restricted and m.extent.count == m.extent.last - m.extent.first + 1:
            yield _positions(m)


def _positions(m: Marginal) -> str:
    """The positions along an axis: "tokens 32 to 34"."""
    extent, places = m.extent, m.places
    if extent.axis == "distance":
        return _distance(m)
    names = f"{extent.axis}s"
    if extent.count == 1:
        return f"{extent.axis} {extent.first}"
    whole = extent.count == extent.last - extent.first + 1
    if extent.count <= LISTED and not (whole and extent.count > 2):
        return f"{names} {_joined(places)}"
    if extent.step > 1:
        return f"every {_ordinal(extent.step)} {extent.axis} from {extent.first}"
    if extent.step == 1:
        if extent.first and m.reaches_end:
            return f"{names} {extent.first} and above"
        return f"{names} {extent.first} to {extent.last}"
    return f"{extent.count} of {extent.size} {names} ({_joined(places[:LISTED])} ...)"


def _distance(m: Marginal) -> str:
    first, last = m.extent.first, m.extent.last
    if first == last == 0:
        return "each token's own key"
    if m.reaches_end and first != last:
        return f"keys {first} and more before their token"
    which = f"{first}" if first == last else f"{first} to {last}"
    return f"{'key' if first == last == 1 else 'keys'} {which} before their token"


def _guesses(m: Marginal, shared: int, width: int) -> list[str]:
    """What the positions look like: "a tile of 32"."""
    extent = m.extent
    first, long = extent.first, extent.last - extent.first + 1
    if extent.axis == "distance":
        return []
    if extent.axis == "head":
        group = extent.step == 1 and long == extent.count == shared > 1 and first % shared == 0
        return [f"those that read key and value head {first // shared}"] if group else []
    if extent.axis == "channel" and extent.size == width and extent.count < width:
        if extent.count == width // 2 and extent.step == 1 and first in (0, width // 2):
            return [f"the {'second' if first else 'first'} half of each head"]
        pairs = {int(place) % (width // 2) for place in m.places}
        if 2 * len(pairs) == extent.count:
            return ["a pair that RoPE rotates" if len(pairs) == 1 else "pairs that RoPE rotates"]
    if extent.step != 1 or extent.count == 1 or extent.axis == "sequence":
        return []
    for tile in _TILES:
        if first % tile == 0:
            if long % tile == 0:
                return [f"a tile of {tile}" if long == tile else f"tiles of {tile}"]
            if first and m.reaches_end:
                return [f"past a multiple of {tile}"]
    return []


def _joined(numbers: NDArray[np.intp]) -> str:
    """Numbers in a sentence: 1, 2 and 3."""
    *others, last = map(str, numbers.tolist())
    return f"{', '.join(others)} and {last}" if others else last


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 // 10 != 1 else 0, "th")
    return f"{number}{ending}"
