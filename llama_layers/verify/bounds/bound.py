r"""How far a correct result can lie from the exact one.

Every bound here holds for any order of summation, fused multiply-adds or not. It is computed
beside the exact result, in float64, from the numbers that the operation was given, so that nothing
inherited from earlier operations counts.

Notation: :math:`u` is the unit roundoff of the format that sums are kept in,
:math:`\gamma_n = n u / (1 - n u)` bounds the product of n factors :math:`1 + \delta` with
:math:`|\delta| \le u` (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, SIAM
2002, lemma 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, FloatFormat, accumulate_format, float_format
from llama_layers.arrays.transfer import to_numpy

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """An exact result, and how far from it a computed one can be.

    Attributes
    ----------
    exact : ndarray of float64
        The operation in float64, on the numbers as they were stored.
    limit : ndarray of float64
        No correct computation errs by more: beyond it is a FAIL. Infinite where nothing can be
        said: the computation can overflow, or sums so many products in so few bits that all may
        be lost.
    usual : ndarray of float64
        Correct computations stay within it in practice, since rounding errors cancel (N. Higham
        and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
        Comput. 41, 2019): beyond it is a WARN.
    """

    exact: Float64Array
    limit: Float64Array
    usual: Float64Array

    def ratio(self, computed: Any, /) -> Float64Array:
        """The error of each element over its limit.

        Parameters
        ----------
        computed : Array, the shape of `exact`
            The result to judge, of any library and float dtype.

        Returns
        -------
        ndarray of float64
            At most 1 where the result can be correct; 0 where it is exact, infinite where it is
            not a number and should be, and where it differs though rounding has no part in it.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        return _error_over(self.limit, self.exact, computed)

    def usual_ratio(self, computed: Any, /) -> Float64Array:
        """The error of each element over what is usual; see `ratio`.

        Parameters
        ----------
        computed : Array, the shape of `exact`
            The result to judge.

        Returns
        -------
        ndarray of float64
            Above 1 where the result deserves a second look.
        """
        return _error_over(self.usual, self.exact, computed)

    def only(self, places: Any, /) -> Bound:
        """The bound for some elements; the others may be anything.

        Parameters
        ----------
        places : ndarray of bool, broadcastable to the shape of `exact`
            True for the elements that are judged.

        Returns
        -------
        Bound
            With no limit elsewhere.
        """
        return replace(
            self,
            limit=np.where(places, self.limit, np.inf),
            usual=np.where(places, self.usual, np.inf),
        )


def _error_over(limit: Float64Array, exact: Float64Array, computed: Any) -> Float64Array:
    float_format("computed", computed)
    values = to_numpy(computed).astype(np.float64)
    if values.shape != exact.shape:
        raise ValueError(f"computed: expected shape {list(exact.shape)}, got {list(values.shape)}")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(values - exact)
        ratio = np.where(error == 0, 0.0, error / limit)
    same = (values == exact) | (np.isnan(values) & np.isnan(exact))
    ratio[~same & ~(np.isfinite(values) & np.isfinite(exact))] = np.inf
    ratio[same | np.isinf(limit)] = 0.0
    return ratio


def gamma(n: int, u: float) -> float:
    r""":math:`\gamma_n`, the largest relative error of n roundings; infinite where n u is 1."""
    return n * u / (1 - n * u) if n * u < 1 else math.inf


def usual_growth(n: int, u: float) -> float:
    r""":math:`4 \sqrt n u`, which n roundings rarely exceed, or :math:`\gamma_n` where smaller."""
    return min(4 * math.sqrt(n) * u, gamma(n, u))


def compounded(*errors: float) -> float:
    r""":math:`\prod (1 + e) - 1` without cancellation: what successive relative errors make."""
    total = 0.0
    for error in errors:
        total += error + total * error
    return total


def formats(
    name: str, x: Any, dtype: str | None, accumulate: str | None
) -> tuple[FloatFormat, FloatFormat]:
    """The formats of a result and of its sums."""
    stored = float_format(name, x)
    out = known_format("dtype", dtype) or stored
    return out, known_format("accumulate", accumulate) or accumulate_format(stored)


def known_format(argument: str, name: str | None) -> FloatFormat | None:
    """The format of that name; a ValueError that names the argument if there is none."""
    if name is not None and name not in FLOATS:
        raise ValueError(f"{argument}: expected one of {', '.join(FLOATS)}, got {name!r}")
    return None if name is None else FLOATS[name]


def narrowing(to: FloatFormat | None, of: FloatFormat) -> FloatFormat | None:
    """The format to round to, or None where it holds the numbers as they are."""
    return None if to is None or to.holds(of) else to


def rounded(error: Any, value: Any, to: FloatFormat | None) -> Any:
    """The error after one more rounding, of what should be `value`."""
    if to is None:
        return error
    u = to.unit_roundoff
    return error * (1 + u) + u * finite_magnitude(value) + to.smallest_subnormal


def input_error(stored: Float64Array, to: FloatFormat | None) -> Float64Array:
    r"""How far numbers that were rounded to a format can be from what they were before.

    A rounding makes :math:`\tilde x = x (1 + d)`, :math:`|d| \le u`, of x, or errs by less than the
    smallest number, so that :math:`|x - \tilde x| \le u / (1 - u) |\tilde x| + \eta`. What is
    infinite may have been any large number. Without a format nothing was rounded.
    """
    if to is None:
        return np.zeros_like(stored)
    u = to.unit_roundoff
    magnitude = np.where(np.isnan(stored), 0.0, np.abs(stored))
    return np.asarray(u / (1 - u) * magnitude + to.smallest_subnormal)


def carried(*products: tuple[Float64Array, Float64Array]) -> tuple[Any, Any]:
    r"""What errors of factors add to a sum of products, at most and usually.

    Of errors and the magnitudes that they are multiplied with, as matrices: :math:`\sum_i \delta_i
    |w_i|`, and :math:`4 \sqrt{\sum_i \delta_i^2 w_i^2}` where that is less, since errors of random
    sign cancel.
    """
    pairs = [(error, size) for error, size in products if error.any() and size.any()]
    most = sum((error @ size for error, size in pairs), 0.0)
    squares = sum((np.square(error) @ np.square(size) for error, size in pairs), 0.0)
    return most, np.minimum(4 * np.sqrt(squares), most)


def read_in(stored: Float64Array, form: FloatFormat | None) -> Float64Array:
    """Numbers as an engine reads them that rounds them to a format first, to nearest."""
    if form is None:
        return stored
    dtype = np.dtype(getattr(ml_dtypes, form.name, form.name))
    with np.errstate(over="ignore"):
        return stored.astype(dtype).astype(np.float64)


def beyond(magnitude: Any, error: Any, to: FloatFormat | None) -> Any:
    """Where a finite number, in error by so much, may overflow a format."""
    if to is None:
        return np.zeros(np.shape(magnitude), bool)
    return np.isfinite(magnitude) & (np.abs(magnitude) + error >= to.max)


def overflowed(exact: Float64Array, *inputs: Float64Array) -> Any:
    """Where finite numbers have no finite result even in float64."""
    places: Any = np.isinf(exact)
    for array in inputs:
        places = places & np.isfinite(array)
    return places


def own_error(sums: FloatFormat) -> float:
    """By what factor an error in the sums' format grows if `exact` errs by as many roundings.

    It is a float64 result itself, which matters where it is compared with one.
    """
    return 1 + FLOATS["float64"].unit_roundoff / sums.unit_roundoff


def bounded(
    exact: Float64Array,
    errors: tuple[Float64Array, Float64Array],
    *,
    unlimited: Any = False,
    certain: Any = False,
) -> Bound:
    """A bound from the largest and the usual errors.

    Elements that are `certain` allow no error, those that are `unlimited`, or whose error is not a
    number though the result is, any.
    """
    limits = []
    for error in errors:
        limit = np.broadcast_to(error, exact.shape).copy()
        limit[(np.isnan(limit) & np.isfinite(exact)) | unlimited] = np.inf
        limit[np.broadcast_to(certain, exact.shape) & np.isfinite(exact)] = 0.0
        limits.append(limit)
    return Bound(exact, *limits)


def lost_to_underflow(sums: FloatFormat, flushes: bool) -> float:
    """The largest error of an operation whose result is below the smallest normal number."""
    return sums.smallest_normal if flushes else sums.smallest_subnormal


def float64(array: Any) -> Float64Array:
    """The numbers in float64."""
    return to_numpy(array).astype(np.float64)


def finite_magnitude(array: Float64Array) -> Float64Array:
    """The magnitudes of the finite numbers, and 0 for the others."""
    return np.where(np.isfinite(array), np.abs(array), 0.0)
