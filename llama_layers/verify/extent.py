"""The positions along an axis that have wrong elements, and whether chance would choose them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# An axis is restricted if wrong elements, thrown at random, would hit as few positions by a chance
# of less than this.
_CHANCE = 0.01
# Of the positions of a run, this share has wrong elements: in the others they are small by chance.
_DENSE = 0.75
# As many positions are listed.
LISTED = 4


@dataclass(frozen=True)
class Extent:
    """The positions along an axis that have wrong elements.

    Attributes
    ----------
    axis : str
        "sequence", "token", "head", "channel", "output channel" (heads side by side), "logit",
        "key", or "distance": of a key before its token.
    size : int
        How long the axis is.
    count : int
        How many positions have wrong elements.
    first, last : int
        The first and the last of them.
    step : int
        1 where they are all from the first to the last, or nearly; n where they are each n-th; else
        0.
    few : bool
        Whether they are at most half of those that could be wrong, and fewer than chance chooses.
    """

    axis: str
    size: int
    count: int
    first: int
    last: int
    step: int
    few: bool


@dataclass(frozen=True, eq=False)
class Marginal:
    """An extent, with what it was found from.

    Attributes
    ----------
    extent : Extent
        The extent.
    dims : tuple of int
        The axes of the array that it is along.
    labels : ndarray of int
        The position of each index along those axes.
    hit : ndarray of bool
        Whether a position has wrong elements.
    could : ndarray of bool
        Whether it has elements that are judged.
    restricted : bool
        Whether they are fewer than chance chooses, however many.
    offset : int
        The label of position 0.
    """

    extent: Extent
    dims: tuple[int, ...]
    labels: NDArray[np.intp]
    hit: NDArray[np.bool_]
    could: NDArray[np.bool_]
    restricted: bool
    offset: int

    @property
    def few(self) -> bool:
        """Whether they are at most half, too."""
        return self.extent.few

    @property
    def places(self) -> NDArray[np.intp]:
        """The positions that have wrong elements."""
        return np.flatnonzero(self.hit) - self.offset

    @property
    def others(self) -> NDArray[np.intp]:
        """The positions that could have wrong elements and have none."""
        return np.flatnonzero(self.could & ~self.hit) - self.offset

    @property
    def reaches_end(self) -> bool:
        """Whether no position after the last could be wrong."""
        return not self.could[self.extent.last + self.offset + 1 :].any()

    def box(self, dimensions: int) -> NDArray[np.bool_]:
        """Whether an element is at one of the positions, with 1 for the other axes."""
        return self.hit[self.labels].reshape(self._broadcast(dimensions))

    def largest(self, size: NDArray[np.float64]) -> NDArray[np.float64]:
        """The largest of an array at each position that has wrong elements."""
        found = np.zeros(len(self.hit))
        np.maximum.at(found, self.labels.ravel(), size.max(axis=self._others(size.ndim)).ravel())
        return found[self.hit]

    def _others(self, dimensions: int) -> tuple[int, ...]:
        return tuple(i for i in range(dimensions) if i not in self.dims)

    def _broadcast(self, dimensions: int) -> tuple[int, ...]:
        lengths = dict(zip(self.dims, self.labels.shape, strict=True))
        return tuple(lengths.get(i, 1) for i in range(dimensions))


def marginal(
    axis: str,
    dims: tuple[int, ...],
    labels: NDArray[np.intp],
    wrong: NDArray[np.bool_],
    judged: NDArray[np.bool_],
    *,
    offset: int = 0,
    spares_first: bool = False,
) -> Marginal:
    """Count the wrong elements at each position along an axis.

    `labels` gives the position, plus `offset`, of each index along the array's axes `dims`. Where
    `spares_first`, the first position is right whatever is wrong elsewhere.
    """
    others = tuple(i for i in range(wrong.ndim) if i not in dims)
    wrongs, chances = (
        np.bincount(labels.ravel(), np.count_nonzero(array, axis=others).ravel())
        for array in (wrong, judged)
    )
    hit, could = wrongs > 0, chances > 0
    places, count = np.flatnonzero(hit), int(wrongs.sum())
    step = _step(places, len(hit))
    share = float(chances[hit].sum() / max(1.0, chances.sum()))
    restricted = share < 1 and _surprise(len(places), len(hit), step, share, count)
    if spares_first and not hit[0]:
        share = float(chances[hit].sum() / max(1.0, chances[1:].sum()))
    extent = Extent(
        axis,
        len(hit) - offset,
        len(places),
        int(places[0]) - offset,
        int(places[-1]) - offset,
        step,
        few=restricted and share <= 0.5,
    )
    return Marginal(extent, dims, labels, hit, could, restricted, offset)


def _step(places: NDArray[np.intp], size: int) -> int:
    """The step from position to position; 0 if they are no run, and do not go through the axis."""
    if len(places) >= _DENSE * (places[-1] - places[0] + 1):
        return 1
    steps = np.diff(places)
    step = int(steps[0])
    through = len(places) > 2 and places[0] < step and places[-1] >= size - step
    return step if through and (steps == step).all() else 0


def _surprise(found: int, size: int, step: int, share: float, count: int) -> bool:
    """Whether wrong elements at random would rarely hit such positions only.

    They do so by a chance of share ** count, for each of the ways to choose such positions.
    """
    chosen = math.lgamma(size + 1) - math.lgamma(found + 1) - math.lgamma(size - found + 1)
    if step:
        chosen = min(chosen, math.log(size * (size + 1) / 2) + math.log(step) * 2)
    return chosen + count * math.log(share) < math.log(_CHANCE)


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The first and the last of each run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found
