"""Mistakes in RMSNorm that are read off the port's own array: other roots and other weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, FloatFormat
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.near import worst_tokens
from llama_layers.verify.mistakes.predicted import rounded
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, evaluated, mistake, moved
from llama_layers.verify.mistakes.rounding import in_each_narrow_format
from llama_layers.verify.operations import Norm
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array, read_in
from llama_layers.verify.tracked import Tracked

# Channels that are needed to solve for a number of each token and to check it.
_CHANNELS = 8
# What is left of the error in channels that were not solved for, squared, at most.
_LEFT = 0.01
# Roots beside the right one that are tried, in last places, and channels in which they are.
_BESIDE, _LOOKED_AT = 64, 256
# A root from which the port's differ by more has another formula.
_NEAR = 0.5


@mistake(Norm, "another root in the norm", kind=Kind.FITTED)
def _(norm: Norm, at: FailingSite) -> Changed | None:
    """Multiplies rows by another number than the inverse root of their mean square, by {0:.6g} to
    {1:.6g} times that; it should take one root for each row, in float32."""
    # Solved for in half of the channels, and held against the others.
    exact, theirs = at.bound(at.formats).exact, wide(at.computed)
    if exact.shape[-1] < _CHANNELS or not np.isfinite(theirs).all():
        return None
    factors = np.empty_like(exact)
    for half in (0, 1):
        y, z = exact[..., 1 - half :: 2], theirs[..., 1 - half :: 2]
        size = np.sum(y * y, axis=-1, keepdims=True)
        factors[..., half::2] = np.sum(y * z, axis=-1, keepdims=True) / np.maximum(size, 1e-300)
    error = np.sum(np.square(theirs - exact))
    if not np.sum(np.square(theirs - exact * factors)) <= 0.1 * error:
        return None
    return moved(at, np.multiply, factors), float(factors.min()), float(factors.max())


@mistake(Norm, "norm weight in another order", kind=Kind.SOLVED)
def _(norm: Norm, at: FailingSite) -> Changed | None:
    """Scales channels with weights in another order, such as channel {0} with that of channel {1};
    it should scale each with its own."""
    # The weights that explain each channel best, put in order beside the right ones.
    right, theirs, scale = at.bound(at.formats).exact, wide(at.computed), norm.scale
    if not (np.isfinite(theirs).all() and scale.all()):
        return None
    axes = tuple(range(right.ndim - 1))
    size = np.maximum(np.sum(np.square(right), axis=axes), 1e-300)
    found = np.sum(right * theirs, axis=axes) / size * scale
    places = np.empty(len(scale), int)
    places[np.argsort(found, kind="stable")] = np.argsort(scale, kind="stable")
    moved = np.flatnonzero(scale[places] != scale)
    if not len(moved):
        return None
    return replace(norm, weight=np.asarray(norm.weight)[places]), moved[0], places[moved[0]]


@in_each_narrow_format
def _roots_in(narrow: str) -> None:
    form = FLOATS[narrow]

    @mistake(
        Norm,
        f"norm computed in {narrow}",
        kind=Kind.SOLVED,
        says=f"Sums squares and takes the root in {narrow}, {{0}} and more; it should keep float32 "
        "to the end.",
    )
    def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
        """The root of each row is a number of the format; all else follows from it."""
        # A root in more bits than the results have can be any number.
        vague = form.precision > at.formats.out.precision
        if vague or not np.isfinite(wide(at.computed)).all():
            return
        for inverse, early, late in product((True, False), (True, False), (True, False)):
            roots = _roots(norm, at, form, inverse, early, late)
            if roots is not None:

                def formula(
                    n: Norm[Tracked],
                    roots: Float64Array = roots,
                    inverse: bool = inverse,
                    how: tuple[bool, bool] = (early, late),
                ) -> Tracked:
                    x = rounded(n.x, form) if how[0] else n.x
                    y = rounded(x * roots if inverse else x / roots, form)
                    return rounded(y * n.weight, form) if how[1] else y * n.weight

                said = f"so that the first is {float(roots.flat[0]):.6g}"
                changed = evaluated(norm, formula)
                yield _either_side(changed, at) if late else changed, said


def _either_side(changed: Computed, at: FailingSite) -> Computed:
    """Numbers of a narrow format; the port's own where it is not sure which of two they are."""

    def bound(how: Rounding) -> Bound:
        found, theirs = changed.bound(how), wide(at.computed)
        unsure = np.abs(theirs - found.exact) <= found.limit
        return replace(found, exact=np.where(unsure, theirs, found.exact))

    return Computed(bound)


def _roots(
    norm: Norm, at: FailingSite, form: FloatFormat, inverse: bool, early: bool, late: bool
) -> Float64Array | None:
    """The root of each row, or its inverse, that explains its first channels best; if one does."""
    exact, theirs = at.bound(at.formats).exact, wide(at.computed)
    for tokens in (worst_tokens(at), np.arange(exact.shape[1])):
        y, z = exact[:, tokens, ..., :_LOOKED_AT], theirs[:, tokens, ..., :_LOOKED_AT]
        some = replace(norm, x=norm.x[:, tokens])
        found, left = _best_roots(some, z, form, inverse, early, late)
        if not left <= _LEFT * np.sum(np.square(y - z)):
            return None
    return found


def _best_roots(
    norm: Norm, theirs: Float64Array, form: FloatFormat, inverse: bool, early: bool, late: bool
) -> tuple[Float64Array, float]:
    """The root of each row that explains its first channels best, and the errors that are left."""
    few = np.s_[..., :_LOOKED_AT]
    square = np.mean(np.square(wide(norm.x)), axis=-1, keepdims=True) + norm.eps
    right = square ** (-0.5 if inverse else 0.5)
    x, weight = wide(norm.x)[few], wide(norm.weight)[few]
    x = read_in(x, form) if early else x
    step = 2 * form.unit_roundoff * np.exp2(np.floor(np.log2(right)))
    best, found = np.full(right.shape, np.inf), right
    for off in range(-_BESIDE, _BESIDE + 1):
        root = read_in(right + off * step, form)
        y = read_in(x * root if inverse else x / root, form) * weight
        y = read_in(y, form) if late else y
        error = np.sum(np.square(y - theirs), axis=-1, keepdims=True)
        found = np.where(error < best, root, found)
        best = np.minimum(error, best)
    return found, float(best.sum())
