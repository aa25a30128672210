"""Parts of sums that are lost in some elements, here and there."""

from __future__ import annotations

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake
from llama_layers.verify.operations import Linear
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array

# Into how many parts sums are split, and how many channels a part has.
_SPLITS = (2, 3, 4, 5, 6, 7, 8, 12, 16)
_SLABS = (256, 128, 64, 32, 16)
# Elements that parts are looked for in: the fewest that say anything, and the most.
_FEWEST, _MOST = 4, 64
# Where more of the elements are wrong, they are not here and there.
_SHARE = 0.5


def _divisions(width: int) -> list[int]:
    """The sizes of parts, the largest first."""
    sizes = {-(-width // parts) for parts in _SPLITS} | {slab for slab in _SLABS if slab < width}
    return sorted(sizes, reverse=True)


@mistake(Linear, "partial sums lost", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Loses in {0} elements the part of the sum over {1} input channels, {2} of them, as where
    threads race; it should add all parts."""
    wrong = at.ratio > 1
    places = np.argwhere(wrong)
    if not _FEWEST <= len(places) <= _SHARE * wrong.size:
        return None
    some = places[np.linspace(0, len(places) - 1, min(len(places), _MOST)).astype(int)]
    for size in _divisions(linear.weight.shape[1]):
        errors, parts = _parts(linear, at, some, size)
        if _lost(errors, parts)[1] <= 1e-2 * np.sum(errors * errors):
            errors, parts = _parts(linear, at, places, size)
            lost, _ = _lost(errors, parts)
            changed = _without(at, wrong, lost)
            which = f"{len(np.unique(np.argmin(_left(errors, parts), axis=1)))}"
            return changed, len(places), size, f"one or several of {parts.shape[1]} parts, {which}"
    return None


def _parts(
    linear: Linear, at: FailingSite, places: np.ndarray, size: int
) -> tuple[Float64Array, Float64Array]:
    """The errors at some places [n], and the parts of their sums [n, parts]."""
    batch, tokens, outputs = places.T
    terms = wide(linear.x[batch, tokens]) * wide(linear.weight[outputs])
    terms = np.pad(terms, ((0, 0), (0, -terms.shape[1] % size)))
    exact = at.bound(at.formats).exact[batch, tokens, outputs]
    errors = wide(at.computed[batch, tokens, outputs]) - exact
    return errors, terms.reshape(len(places), -1, size).sum(axis=-1)


def _left(errors: Float64Array, parts: Float64Array) -> Float64Array:
    return np.square(errors[:, None] + parts)


def _lost(errors: Float64Array, parts: Float64Array) -> tuple[Float64Array, float]:
    """The part that each element seems to lack, and the squared error that is left."""
    left = _left(errors, parts)
    best = np.argmin(left, axis=1)[:, None]
    lost = np.take_along_axis(parts, best, axis=1)[:, 0]
    return lost, float(np.take_along_axis(left, best, axis=1).sum())


def _without(at: FailingSite, wrong: np.ndarray, lost: Float64Array) -> Computed:
    """The right result, less what is lost where it is wrong."""
    less = np.zeros(wrong.shape)
    less[wrong] = lost

    def bound(how: Rounding) -> Bound:
        right = at.bound(how)
        rounding = FLOATS[how.dtype].unit_roundoff * np.abs(less)
        limits = (y + rounding for y in (right.limit, right.usual))
        return Bound(right.exact - less, *limits)

    return Computed(bound)
