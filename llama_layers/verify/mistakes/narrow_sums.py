"""Sums in too few bits, told by the size and kind of the errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.verify.attention import OverHeads
from llama_layers.verify.bound import Bound
from llama_layers.verify.defined import where_defined
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake
from llama_layers.verify.mistakes.rounding import are_numbers_of, in_each_narrow_format
from llama_layers.verify.operations import Linear, Norm
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array


@in_each_narrow_format
def _sums_in(narrow: str) -> None:
    @mistake(
        Linear | Norm | OverHeads,
        f"sums kept in {narrow}",
        kind=Kind.SOLVED,
        loosens=True,
        says=f"The port's errors are of the size and kind that sums kept in {narrow} make; sums "
        "need float32 at the least.{0}",
    )
    def _(operation: Linear | Norm | OverHeads, at: FailingSite) -> Iterator[Changed]:
        r"""Errors as sums in a narrow format leave them.

        A bound cannot tell: it is vacuous from n = 1 / u on. Conditions, with u of the narrow
        format and n products an element: every error within what is usual in that format; all
        together between u / 8 and sqrt(n) u / 2 of the result; no correlation with the result above
        0.3, since a scaled result is not a rounding; and no token that errs by over 8 times the
        median.
        """
        if FLOATS[narrow].precision >= FLOATS[at.formats.accumulate].precision:
            return
        right = where_defined(at.bound(at.formats), at.site, at.recorded)
        judged = np.isfinite(right.limit) & np.isfinite(right.exact)
        with np.errstate(invalid="ignore"):
            error = np.where(judged, wide(at.computed) - right.exact, 0.0)
        exact = np.where(judged, right.exact, 0.0)
        terms = getattr(operation, operation.inputs[0]).shape[-1]  # products an element
        coarse = are_numbers_of("bfloat16", at.computed) or _are_coarse(error, exact, terms)
        if coarse != (narrow == "bfloat16") or not _like_rounding(error, exact, narrow, terms):
            return

        def bound(how: Rounding) -> Bound:
            narrower = operation.bound(replace(how, accumulate=narrow))
            return replace(narrower, limit=narrower.usual)

        stored = (
            f" Or it computes in a wider format and only writes its arrays in {narrow}: write them "
            "as they are computed."
        )
        yield Computed(bound), stored if dtype_name(at.computed.dtype) == narrow else ""


def _are_coarse(error: Float64Array, exact: Float64Array, terms: int) -> bool:
    """Whether errors are nearer to those of bfloat16 sums than to those of float16 sums.

    In sums one after the other, roundings add up to some 0.2 sqrt(n) u of the result; between the
    two formats the middle, of a factor 8, is at 0.07 sqrt(n) u of bfloat16.
    """
    size = 0.07 * np.sqrt(terms) * FLOATS["bfloat16"].unit_roundoff * np.linalg.norm(exact)
    return bool(np.linalg.norm(error) >= size)


def _like_rounding(error: Float64Array, exact: Float64Array, narrow: str, terms: int) -> bool:
    u = FLOATS[narrow].unit_roundoff
    size, whole = np.linalg.norm(error), np.linalg.norm(exact)
    if not 0 < u / 8 * whole <= size <= np.sqrt(terms) / 2 * u * whole:
        return False
    if abs(np.sum(error * exact)) > 0.3 * size * whole:
        return False
    axes = (-1,) if error.ndim == 3 else (-1, -2)
    each = np.sqrt(np.sum(error**2, axis=axes) / np.maximum(np.sum(exact**2, axis=axes), 1e-300))
    return bool(each.max() <= 8 * np.median(each[each > 0]))
