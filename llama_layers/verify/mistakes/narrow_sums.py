"""Sums in too few bits, told by the size and kind of the errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.verify.bound import Bound
from llama_layers.verify.defined import where_defined
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.attention_arrays import (
    scores_of,
    sinks_of,
    softmax,
    values_of,
)
from llama_layers.verify.mistakes.evidence import (
    has_no_mean,
    is_linear,
    is_of_low_rank,
    is_relative,
    is_spread,
    on_a_coarser_grid,
)
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake
from llama_layers.verify.mistakes.rounding import (
    NARROW,
    are_numbers_of,
    in_each_narrow_format,
    narrowed,
)
from llama_layers.verify.operations import Attention, Linear, Operation
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array

_SUMS = Linear | Attention


@in_each_narrow_format
def _sums_in(narrow: str) -> None:
    def shows(at: FailingSite, bound: Bound) -> bool:
        r"""Whether errors are those that sums in a narrow format leave.

        A bound cannot tell: it is vacuous from n = 1 / u on. With u of the narrow format and n
        products an element: all numbers are those of the format; all errors together are between
        u / 8 and sqrt(n) u / 2 of the result; they have nothing to do with the result, since a
        scaled result is not a rounding, nor with either factor; and they are spread, to both sides.
        """
        error, exact = _errors(at)
        return _looks_like(at, narrow) and _unlike_another_product(at, narrow, error, exact, bound)

    @mistake(
        _SUMS,
        f"sums kept in {narrow}",
        kind=Kind.SOLVED,
        loosens=True,
        shows=shows,
        says=f"The port's errors are of the size and kind that sums kept in {narrow} make; sums "
        "need float32 at the least.{0}",
    )
    def _(operation: _SUMS, at: FailingSite) -> Iterator[Changed]:
        """Within what is usual in the format."""
        if FLOATS[narrow].precision >= FLOATS[at.formats.accumulate].precision:
            return
        if not _looks_like(at, narrow):
            return  # before the bound is computed, which shows little

        stored = (
            f" Or it computes in a wider format and only writes its arrays in {narrow}: write them "
            "as they are computed."
        )
        yield _usually(operation, narrow), stored if dtype_name(at.computed.dtype) == narrow else ""


def _errors(at: FailingSite) -> tuple[Float64Array, Float64Array]:
    """The errors and the exact numbers of a site; zeros where they mean nothing."""
    right = where_defined(at.bound(at.formats), at.site, at.recorded)
    judged = np.isfinite(right.limit) & np.isfinite(right.exact)
    with np.errstate(invalid="ignore"):
        error = np.where(judged, wide(at.computed) - right.exact, 0.0)
    return error, np.where(judged, right.exact, 0.0)


def _looks_like(at: FailingSite, narrow: str) -> bool:
    """Whether numbers and errors are of the format's kind, as far as they tell without a bound."""
    error, exact = _errors(at)
    terms = getattr(at.operation, at.operation.inputs[0]).shape[-1]  # products an element
    coarse = are_numbers_of("bfloat16", at.computed) or _are_coarse(error, exact, terms)
    return (
        coarse == (narrow == "bfloat16")
        and are_numbers_of(_stored(at, narrow), at.computed)
        and _like_rounding(error, exact, narrow, terms)
    )


def _usually(operation: Operation, narrow: str) -> Computed:
    """An operation with sums in a narrow format, within what is usual then."""

    def few(tokens: NDArray[np.intp]) -> Computed | None:
        some = operation.at_tokens(tokens)
        return None if some is None else _usually(some, narrow)

    def bound(how: Rounding) -> Bound:
        narrower = operation.bound(replace(how, accumulate=narrow))
        return replace(narrower, limit=narrower.usual)

    return Computed(bound, few)


def _stored(at: FailingSite, narrow: str) -> str:
    """The format whose numbers the array has: the narrow one, or its own where that is narrower."""
    return min(narrow, at.formats.dtype, key=lambda name: FLOATS[name].precision)


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


def _unlike_another_product(
    at: FailingSite, narrow: str, error: Float64Array, exact: Float64Array, bound: Bound
) -> bool:
    """Whether errors are spread as roundings are, and are no product of something with a factor.

    Where too few rows can tell of products, an array of narrow numbers tells, if what it was
    computed from are others: then they were not all written out so.
    """
    tokens = error.shape[0] * error.shape[1]
    flat, right, usual = (y.reshape(tokens, -1) for y in (error, exact, bound.usual))
    stored = _stored(at, narrow)
    rounded = wide(narrowed(right, stored)) if stored in NARROW else right
    theirs = wide(at.computed).reshape(tokens, -1)
    if not (is_spread(flat, usual) and has_no_mean(flat)) or is_relative(flat, right):
        return False
    if is_of_low_rank(flat, usual) or on_a_coarser_grid(theirs, rounded):
        return False
    read = getattr(at.operation, at.operation.inputs[0])
    alone = stored != at.formats.dtype and not are_numbers_of(narrow, read)
    linear = (None, False) if alone else (False,)
    return all(is_linear(pairs) in linear for pairs in _by_factor(at.operation, error))


def _by_factor(
    operation: object, error: Float64Array
) -> Iterator[list[tuple[Float64Array, Float64Array]]]:
    """For each of the two factors of a product: errors, a row for each of the factor's rows."""
    if isinstance(operation, Linear):
        flat = error.reshape(-1, error.shape[-1])
        yield [(flat, wide(operation.x).reshape(len(flat), -1))]
        yield [(flat.T, wide(operation.weight))]
    elif isinstance(operation, Attention):
        allowed = np.asarray(operation.mask)
        scores, values = scores_of(operation), values_of(operation)
        seen = np.broadcast_to(allowed[:, None], scores.shape)
        weights = softmax(scores, seen, sinks_of(operation))
        heads = [
            (error[b, :, h], weights[b, h], values[b, h]) for b, h in np.ndindex(scores.shape[:2])
        ]
        yield [(e, p) for e, p, _ in heads]
        yield [(e.T, v.T) for e, _, v in heads]
