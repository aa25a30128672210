"""The right formula in too few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.verify.bounds import Bound
from llama_layers.verify.defined import where_defined
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Float64Array,
    Formula,
    Hypothesis,
    Kind,
    wide,
)
from llama_layers.verify.operations import (
    Attention,
    Embedding,
    Formats,
    Gate,
    Linear,
    Norm,
    Probabilities,
    Residual,
    Rope,
    Scores,
    Softmax,
    WeightedSum,
)

_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_INPUTS: dict[type, tuple[str, ...]] = {
    Linear: ("x", "weight"),
    Norm: ("x", "weight"),
    Attention: ("q", "k", "v"),
    Scores: ("q", "k"),
    Probabilities: ("q", "k"),
    WeightedSum: ("probabilities", "v"),
    Gate: ("gate", "up"),
    Residual: ("x", "added"),
    Rope: ("x",),
    Embedding: ("table",),
}
_Any = (
    Linear | Norm | Attention | Scores | Probabilities | WeightedSum | Gate | Residual | Rope
    | Embedding
)  # fmt: skip
_WEIGHTS: dict[type, tuple[str, ...]] = {
    Linear: ("weight", "bias"),
    Norm: ("weight",),
    Embedding: ("table",),
}
_Summing = Linear | Norm | Attention | Scores | Probabilities | Softmax | WeightedSum


def tf32(array: NDArray[Any], half: int) -> NDArray[np.float32]:
    """Numbers of 10 bits after the point: the other 13 are cut off, after `half` was added."""
    numbers = np.array(array, np.float32)
    odd = ~np.isfinite(numbers)
    kept = numbers[odd]
    bits = numbers.view(np.uint32)
    bits += np.uint32(half)
    bits &= np.uint32(0xFFFFE000)
    numbers[odd] = kept
    return numbers


def _narrow(dtype: Any) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def rounded(array: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            return array.astype(dtype).astype(np.float32)

    return rounded


def _inputs_rounded(
    *roundings: Callable[[NDArray[Any]], NDArray[Any]], parts: bool = True
) -> Callable[[Any, FailingSite], Iterator[Change]]:
    """All inputs rounded, and if `parts` some of them."""

    def changes(operation: Any, failing: FailingSite) -> Iterator[Change]:
        names = _INPUTS[type(operation)]
        weights = set(_WEIGHTS.get(type(operation), ()))
        for rounding in roundings:
            rounded = {name: rounding(getattr(operation, name)) for name in names}
            # To round weights alone is a mistake of its own.
            told = {
                name
                for name in set(names) - weights
                if not parts or not np.array_equal(rounded[name], wide(getattr(operation, name)))
            }
            for count in range(len(names), 0, -1) if parts else (len(names),):
                for some in combinations(names, count):
                    if told.intersection(some):
                        yield Change(replace(operation, **{n: rounded[n] for n in some}), "")

    return changes


def _weights_rounded(narrow: str) -> Callable[[Any, FailingSite], Iterator[Computable]]:
    rounding = _narrow(_DTYPES[narrow])

    def changes(operation: Any, failing: FailingSite) -> Iterator[Computable]:
        weights = {name: getattr(operation, name) for name in _WEIGHTS[type(operation)]}
        yield replace(operation, **{n: rounding(w) for n, w in weights.items() if w is not None})

    return changes


def _named(
    name: str,
    operations: Any,
    changes: Callable[[Any, FailingSite], Iterator[Change]],
    detail: str,
) -> Hypothesis:
    def told(operation: Any, failing: FailingSite) -> Iterator[Change]:
        for change in changes(operation, failing):
            yield change._replace(detail=change.detail or detail)

    return Hypothesis(name, operations, told, detail, Kind.ROUNDING)


@dataclass(frozen=True, eq=False)
class InFormats:
    """An operation in other formats than the port says."""

    operation: Computable
    dtype: str | None = None
    accumulate: str | None = None
    usually: bool = False

    def bound(self, formats: Formats) -> Bound:
        """Its bound in them; what is usual in the place of the limit, if asked."""
        other = replace(
            formats,
            dtype=self.dtype or formats.dtype,
            accumulate=self.accumulate or formats.accumulate,
        )
        bound = self.operation.bound(other)
        return replace(bound, limit=bound.usual) if self.usually else bound


def _are_numbers_of(narrow: str, array: NDArray[Any]) -> bool:
    """Whether every finite number of an array is one of a narrower format."""
    numbers = wide(array)
    with np.errstate(over="ignore"):
        same = numbers.astype(_DTYPES[narrow]).astype(np.float64) == numbers
    return bool(same[np.isfinite(numbers)].all())


def _result_rounded(narrow: str) -> Callable[[Any, FailingSite], Iterator[Computable]]:
    def changes(operation: Any, failing: FailingSite) -> Iterator[Computable]:
        narrower = FLOATS[narrow].precision < FLOATS[failing.formats.dtype].precision
        if narrower and _are_numbers_of(narrow, failing.computed):
            yield InFormats(operation, dtype=narrow)

    return changes


@dataclass(frozen=True, eq=False)
class Truncated:
    """An operation whose result is cut off to its format, in the place of rounded."""

    operation: Computable

    def bound(self, formats: Formats) -> Bound:
        """Half a unit in the last place below the exact result, and as much around it."""
        bound = self.operation.bound(replace(formats, dtype=formats.accumulate))
        out = FLOATS[formats.dtype]
        with np.errstate(all="ignore"):
            _, exponent = np.frexp(bound.exact)
            unit = np.ldexp(2.0 * out.unit_roundoff, exponent - 1)
            unit = np.maximum(unit, out.smallest_subnormal)
        below = bound.exact - np.sign(bound.exact) * unit / 2
        return Bound(below, unit / 2 + bound.limit, unit / 2 + bound.usual)


def _truncated(operation: Any, failing: FailingSite) -> Iterator[Computable]:
    if FLOATS[failing.formats.dtype].precision < FLOATS[failing.formats.accumulate].precision:
        yield Truncated(operation)


def _narrow_sums(narrow: str) -> Callable[[Any, FailingSite], Iterator[Change]]:
    r"""Errors as sums in a narrow format leave them.

    No bound tells: it is vacuous from n = 1 / u on. What is asked for, with u of the narrow format
    and n products an element: every error within what is usual in that format; all together
    between u / 8 and sqrt(n) u / 2 of the result; no correlation with the result above 0.3, since a
    scaled result is no rounding; and no token that errs by over 8 times the median.
    """

    def changes(operation: Any, failing: FailingSite) -> Iterator[Change]:
        if FLOATS[narrow].precision >= FLOATS[failing.formats.accumulate].precision:
            return
        bound = where_defined(failing.bound(failing.formats), failing.site, failing.recorded)
        judged = np.isfinite(bound.limit) & np.isfinite(bound.exact)
        with np.errstate(invalid="ignore"):
            error = np.where(judged, wide(failing.computed) - bound.exact, 0.0)
        exact, terms = np.where(judged, bound.exact, 0.0), _terms(operation)
        coarse = _are_numbers_of("bfloat16", failing.computed) or _are_coarse(error, exact, terms)
        if coarse == (narrow == "bfloat16") and _like_rounding(error, exact, narrow, terms):
            said = (
                f"The port's errors are of the size and kind that sums kept in {narrow} make; sums "
                "need float32 at the least."
            )
            if dtype_name(failing.computed.dtype) == narrow:
                said += (
                    f" Or it computes in a wider format and only writes its arrays in {narrow}: "
                    "write them as they are computed."
                )
            yield Change(InFormats(operation, accumulate=narrow, usually=True), said)

    return changes


def _are_coarse(error: Float64Array, exact: Float64Array, terms: int) -> bool:
    """Whether errors are nearer to those of bfloat16 sums than to those of float16 sums.

    In sums one after the other, roundings add up to some 0.2 sqrt(n) u of the result; between the
    two formats the middle, of a factor 8, is at 0.07 sqrt(n) u of bfloat16.
    """
    size = 0.07 * np.sqrt(terms) * FLOATS["bfloat16"].unit_roundoff * np.linalg.norm(exact)
    return bool(np.linalg.norm(error) >= size)


def _terms(operation: Any) -> int:
    """How many products an element is summed from."""
    x = getattr(operation, _INPUTS.get(type(operation), ("scores",))[0])
    return int(x.shape[-1])


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


def _narrow_mean(narrow: str) -> Callable[[Norm, FailingSite], Iterator[Formula]]:
    """The mean square of each token as a number of a narrow format, read off the port's rows."""

    def changes(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
        x = wide(norm.x)
        square = np.mean(np.square(x), axis=-1, keepdims=True)
        normed = x * wide(norm.weight)
        with np.errstate(all="ignore"):
            factor = np.sum(wide(failing.computed) * normed, axis=-1, keepdims=True)
            factor /= np.sum(np.square(normed), axis=-1, keepdims=True)
            found = factor**-2.0 - norm.eps
            mean = found.astype(_DTYPES[narrow]).astype(np.float64)
            off = np.abs(mean / square - 1)
        # Whatever is summed in so few bits: the sum may stop to grow long before its end.
        coarser = np.asarray(mean.astype(_DTYPES["bfloat16"]), np.float64)
        if narrow != "bfloat16" and (coarser == mean).all():
            return  # numbers of both formats: the coarser one tells more
        if np.isfinite(off).all() and 0 < off.max() < 0.9:
            exact = normed / np.sqrt(mean + norm.eps)
            yield Formula(exact, np.abs(exact), 8)

    return changes


_CUT_OFF = 0
_HALF = 0x1000

HYPOTHESES = (
    _named(
        "inputs rounded to TF32",
        Linear | Attention | Scores | Probabilities | WeightedSum,
        _inputs_rounded(lambda y: tf32(y, _HALF), lambda y: tf32(y, _CUT_OFF), parts=False),
        "The port seems to multiply in TF32, with 10 bits after the point, not in float32.",
    ),
    *(
        _named(
            f"inputs rounded to {narrow}",
            _Any,
            _inputs_rounded(_narrow(dtype)),
            f"The port seems to round inputs to {narrow} before it computes.",
        )
        for narrow, dtype in _DTYPES.items()
    ),
    *(
        Hypothesis(
            f"weights rounded to {narrow}",
            Linear | Norm | Embedding,
            _weights_rounded(narrow),
            f"The port seems to have rounded the model's weights to {narrow} when it loaded them. "
            f"If that is meant, hold it against those: --weights-dtype {narrow}, in Python "
            f"load(..., dtype={narrow!r}).",
            Kind.ROUNDING,
        )
        for narrow in _DTYPES
    ),
    *(
        Hypothesis(
            f"result rounded to {narrow}",
            _Any | Softmax,
            _result_rounded(narrow),
            f"Every number of the port's is one of {narrow}, and within its rounding.",
            Kind.ROUNDING,
            loosens=True,
        )
        for narrow in _DTYPES
    ),
    Hypothesis(
        "result cut off",
        _Any | Softmax,
        _truncated,
        "The port seems to cut results off to their format; they should be rounded to nearest.",
        Kind.ROUNDING,
    ),
    *(
        Hypothesis(
            f"norm's mean in {narrow}",
            Norm,
            _narrow_mean(narrow),
            f"Each token's mean square seems to be a number of {narrow}; sums need float32 at the "
            "least.",
            Kind.ROUNDING,
        )
        for narrow in _DTYPES
    ),
    *(
        Hypothesis(
            f"sums kept in {narrow}",
            _Summing,
            _narrow_sums(narrow),
            kind=Kind.SOLVED,
            loosens=True,
        )
        for narrow in _DTYPES
    ),
)
