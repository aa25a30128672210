r"""Numbers that carry a bound on the error of any computation of them.

A `Tracked` array has the exact numbers in float64, and how far off they can be if an engine
computes them in the stated formats (running error analysis: Higham, "Accuracy and Stability of
Numerical Algorithms", 2nd edition, SIAM 2002, section 3.3). A formula over tracked numbers is
therefore both the operation and its bound, right or wrong:

>>> import numpy as np
>>> from llama_layers.verify.profiles import Rounding
>>> from llama_layers.verify.tracked import read
>>> x = read("x", np.float32([[3.0, 4.0]]), Rounding("float32", "float32"))
>>> norm = x * ((x * x).mean() + 1e-5).rsqrt()
>>> norm.exact.round(3), norm.off.max() < 1e-6
(array([[0.849, 1.131]]), np.True_)

With u the unit roundoff of the sums' format, each operation adds the errors that it inherits and
:math:`u (|y| + e)` for its own rounding, where y is its exact result and e what it inherited; and
what underflow loses. (u is that of float64 larger, since the exact result is computed in
float64 itself, which matters where float64 is judged.) A product with 0 or 1 and a sum with 0 are
not rounded. Matrix products, and operations in which errors cancel, have a rule of their own in
`llama_layers.verify.rules`.

Two errors are carried: `off`, which no correct computation exceeds, and `usual`, which rounding
errors of random sign rarely exceed: :math:`4 \sqrt n u` instead of
:math:`\gamma_n = n u / (1 - n u)`, the largest error of n roundings (Higham, lemma 3.1). An
infinite error means that nothing can be said, since the computation may overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llama_layers.arrays.dtypes import FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.verify.bound import Bound
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import (
    GROWTHS,
    Float64Array,
    finite_magnitude,
    gamma,
    input_error,
    read_in,
)

Operand: TypeAlias = "Tracked | ArrayLike"
Errors = tuple[Float64Array, Float64Array]
Places = NDArray[np.bool_] | np.bool_


@dataclass(frozen=True, eq=False)
class Tracked:
    """Numbers, and how far an engine's can be from them."""

    exact: Float64Array  # computed in float64
    off: Float64Array  # the largest error, of a shape that broadcasts to that of `exact`
    usual: Float64Array  # the error that is rarely exceeded
    how: Rounding  # the formats of the engine
    form: FloatFormat  # the format that holds the engine's numbers
    stored: bool = False  # so that an engine that flushes reads subnormal numbers as 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return self.exact.shape

    @property
    def size(self) -> Float64Array:
        """The largest magnitudes that an engine's numbers can have where they are finite."""
        size = finite_magnitude(self.exact)
        return size + self.off if self.off.any() else size

    # Operations on two numbers.

    def __add__(self, other: Operand) -> Tracked:
        """The sum; one with 0 is exact, and so is 0 itself, since sums do not underflow."""
        b = self._number(other)
        with np.errstate(all="ignore"):
            exact = self.exact + b.exact
            # Two numbers that cancel exactly are flushed both, or neither.
            cancel = (exact == 0) & (self.off == 0) & (b.off == 0)
            lost = np.where(cancel, 0.0, self._flushed() + b._flushed())
            errors = self.errors(lambda e, f: e + f + lost, b)
            return self._result(exact, errors, ~(self.certainly(0) | b.certainly(0)), 0.0, self, b)

    def __mul__(self, other: Operand) -> Tracked:
        """The product; one with 0 or 1 is exact."""
        b = self._number(other)
        with np.errstate(all="ignore"):
            exact = self.exact * b.exact
            size, size_b = finite_magnitude(self.exact), finite_magnitude(b.exact)
            lost = self._flushed() * size_b + size * b._flushed()
            unsure = self._unsure_sign(b) | b._unsure_sign(self)

            def error(e: Float64Array, f: Float64Array) -> Float64Array:
                error = _times(e, size_b) + _times(f, size + e) + lost
                return np.where(unsure, np.inf, error) if unsure.any() else np.asarray(error)

            inexact = ~(self.certainly(0) | b.certainly(0) | self.certainly(1) | b.certainly(1))
            tiny = self.how.sums.smallest_subnormal * inexact
            return self._result(exact, self.errors(error, b), inexact, tiny, self, b)

    def __truediv__(self, other: Operand) -> Tracked:
        """The quotient; infinitely off where the divisor may be 0 and is not."""
        b = self._number(other)
        with np.errstate(all="ignore"):
            exact = self.exact / b.exact
            size, size_b = finite_magnitude(exact), finite_magnitude(b.exact)
            lost = self._flushed() / np.where(size_b > 0, size_b, 1.0)

            def error(e: Float64Array, f: Float64Array) -> Float64Array:
                left = np.where(np.isfinite(b.exact), size_b - f, np.inf)
                quotient = np.where(left > 0, (e + size * f) / left + lost, 0.0)
                unsure = b._vanishes() | ((left <= 0) & ((e > 0) | (f > 0)))
                return np.where(unsure, np.inf, quotient)

            inexact = ~(self.certainly(0) | b.certainly(1))
            tiny = self.how.sums.smallest_subnormal * inexact
            return self._result(exact, self.errors(error, b), inexact, tiny)

    def __neg__(self) -> Tracked:
        """The numbers with the other sign, which is exact."""
        return replace(self, exact=-self.exact)

    def __sub__(self, other: Operand) -> Tracked:
        """The difference, as a sum."""
        return self + -self._number(other)

    def __rsub__(self, other: Operand) -> Tracked:
        """The difference from a number."""
        return self._number(other) - self

    def __rtruediv__(self, other: Operand) -> Tracked:
        """The quotient of a number."""
        return self._number(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    # Functions of one number.

    def sqrt(self) -> Tracked:
        """The square root, within `root_ulps` units in the last place."""
        with np.errstate(all="ignore"):
            exact = np.sqrt(self.exact)

            def error(e: Float64Array) -> Float64Array:
                part = np.minimum(e / self._divisor(), 1.0)
                shrunk = -finite_magnitude(exact) * np.expm1(np.log1p(-part) / 2)
                return np.where((self.exact == 0) | np.isinf(e), np.sqrt(e), shrunk)

            return self._result(exact, self.errors(error), 2 * self.how.profile.root_ulps, 0.0)

    def rsqrt(self) -> Tracked:
        """1 over the square root, within `root_ulps` units in the last place.

        A root and a division that are each rounded correctly are within 1.
        """
        with np.errstate(all="ignore"):
            exact = 1 / np.sqrt(self.exact)

            def error(e: Float64Array) -> Float64Array:
                part = e / self._divisor()
                grown = finite_magnitude(exact) * np.expm1(-np.log1p(-np.minimum(part, 1.0)) / 2)
                return np.where(e == 0, 0.0, np.where((part >= 1) | np.isinf(e), np.inf, grown))

            return self._result(exact, self.errors(error), 2 * self.how.profile.root_ulps, 0.0)

    def exp(self) -> Tracked:
        """The exponential, within `exp_ulps` units in the last place; 0 of minus infinity."""
        with np.errstate(all="ignore"):
            exact = np.exp(self.exact)
            errors = self.errors(lambda e: finite_magnitude(exact) * np.expm1(e))
            tiny = self.how.sums.smallest_subnormal * ~((exact == 0) & (self.off == 0))
            return self._result(exact, errors, 2 * self.how.profile.exp_ulps, tiny, self)

    def apply(self, function: Callable[[Float64Array], np.ndarray], slope: float = 1.0) -> Tracked:
        """A function that changes by `slope` times its argument at most, as exact as `exp`."""
        with np.errstate(all="ignore"):
            exact = np.asarray(function(self.exact), np.float64)
            errors = self.errors(lambda e: slope * e)
            return self._result(exact, errors, 2 * self.how.profile.exp_ulps, 0.0, self)

    # Functions of a row.

    def sum(self, axis: int = -1) -> Tracked:
        r"""The sum, in any order, with the axis kept.

        n numbers have n - 1 roundings:
        :math:`|\hat s - s| \le \sum e_i + \gamma_{n-1} \sum (|x_i| + e_i)`. Inherited errors
        usually cancel, too, to :math:`4 \sqrt{\sum e_i^2}`.
        """
        return self._summed(axis, self.shape[axis] - 1)

    def mean(self, axis: int = -1) -> Tracked:
        """The mean: two roundings for a division, or a product with the rounded inverse."""
        n = self.shape[axis]
        total = self._summed(axis, n + 1)
        with np.errstate(all="ignore"):
            tiny = self.how.sums.smallest_subnormal * (total.size > 0)
            return self._result(total.exact / n, total.errors(lambda e: e / n), 0.0, tiny, total)

    def max(self, axis: int = -1) -> Tracked:
        """The largest number, with the axis kept."""
        exact = self.exact.max(axis=axis, keepdims=True, initial=-np.inf)
        errors = self.errors(
            lambda e: np.broadcast_to(e, self.shape).max(axis=axis, keepdims=True, initial=0.0)
        )
        return self.with_errors(errors, exact=exact)

    def _summed(self, axis: int, roundings: int) -> Tracked:
        with np.errstate(all="ignore"):

            def total(e: float | Float64Array) -> Float64Array:
                return np.broadcast_to(e, self.shape).sum(axis=axis, keepdims=True)

            # In another order than a float64 result is summed in, which is not its own judge.
            exact = np.flip(self.exact, axis).sum(axis=axis, keepdims=True)
            u = self.how.sums.unit_roundoff
            size, lost, most = (total(e) for e in (self.size, self._flushed(), self.off))
            inherited = (most, np.minimum(4 * np.sqrt(total(np.square(self.usual))), most))
            # An infinite sum may be one of a number that overflowed only where it was stored.
            fits = (size * (1 + gamma(roundings, u)) < self.how.sums.max) & ~np.isinf(exact)
            errors = [
                np.where(fits, e + self.how.own * grow(roundings, u) * size + lost, np.inf)
                for e, grow in zip(inherited, GROWTHS, strict=True)
            ]
            return self._result(exact, (errors[0], errors[1]), 0.0, 0.0)

    # What becomes of the numbers.

    def to(self, form: FloatFormat | None) -> Tracked:
        """The numbers rounded to a format, unless it holds them as they are."""
        if form is None or form.holds(self.form):
            return self
        size = finite_magnitude(self.exact)
        same = self.off == 0
        if same.any():
            same = same & (read_in(self.exact, form) == self.exact)
        with np.errstate(all="ignore"):

            def error(e: Float64Array) -> Float64Array:
                rounded = np.asarray(form.unit_roundoff * (size + e))
                rounded += form.smallest_subnormal
                rounded *= ~same
                rounded += e
                rounded[~(size + rounded < form.max)] = np.inf
                return rounded

            return replace(self.with_errors(self.errors(error)), form=form)

    def step(self, name: str) -> Tracked:
        """The numbers rounded as the profile rounds the step of that name, if it does."""
        return self.to(self.how.step(name))

    def moved(self, move: Callable[[Float64Array], Float64Array]) -> Tracked:
        """The numbers in other places: reshaped, permuted, selected or repeated."""
        errors = self.errors(lambda e: move(np.broadcast_to(e, self.shape)) if e.any() else _NONE)
        return self.with_errors(errors, exact=move(self.exact))

    def __getitem__(self, index: Any) -> Tracked:
        """Some of the numbers."""
        return self.moved(lambda array: array[index])

    def where(self, places: Places, other: Operand) -> Tracked:
        """The numbers in some places, and another elsewhere."""
        b = self._number(other)
        errors = self.errors(lambda e, f: np.asarray(np.where(places, e, f)), b)
        return self.with_errors(errors, exact=np.where(places, self.exact, b.exact))

    def only(self, places: Places) -> Tracked:
        """The numbers, of which those elsewhere may be anything."""
        return self.with_errors(self.errors(lambda e: np.where(places, e, np.inf)))

    def bound(self) -> Bound:
        """The bound of a result, rounded to its format."""
        last = self.to(self.how.out)
        errors = last.errors(lambda e: e if e.shape == last.shape else np.full(last.shape, e))
        return Bound(last.exact, *errors)

    # How it is done.

    def _number(self, other: Operand) -> Tracked:
        return other if isinstance(other, Tracked) else constant(other, self.how)

    def with_errors(self, errors: Errors, exact: Float64Array | None = None) -> Tracked:
        """The same numbers, or others, with other errors."""
        exact = self.exact if exact is None else exact
        return replace(self, exact=exact, off=errors[0], usual=errors[1])

    def errors(self, rule: Callable[..., Float64Array], *others: Tracked) -> Errors:
        """The largest and the usual error by a rule for the errors of operands."""
        operands = (self, *others)
        most = rule(*(number.off for number in operands))
        if all(number.usual is number.off for number in operands):
            return most, most
        return most, rule(*(number.usual for number in operands))

    def _result(
        self,
        exact: Float64Array,
        errors: Errors,
        roundings: float | Places,
        lost: float | NDArray[np.floating],
        *operands: Tracked,
    ) -> Tracked:
        """A result with errors from its operands, its own roundings, and what underflow loses.

        Finite operands that are given must have a finite result.
        """
        size, sums = finite_magnitude(exact), self.how.sums
        infinite = np.isinf(exact) if operands else np.False_
        for operand in operands if infinite.any() else ():
            infinite = infinite & np.isfinite(operand.exact)
        found: list[Float64Array] = []
        for e in errors if errors[1] is not errors[0] else errors[:1]:
            error = np.asarray(size + e)
            error *= roundings * self.how.unit
            error += e + lost
            if self.how.profile.flushes:
                tiny = sums.smallest_normal
                error += np.where(size - error < tiny, np.minimum(size, tiny), 0.0)
            error[infinite | ~(size + error < sums.max)] = np.inf
            found.append(error)
        return Tracked(exact, found[0], found[-1], self.how, sums)

    def _divisor(self) -> Float64Array:
        """The numbers to divide errors by: infinity where a number is not finite."""
        return np.where(np.isfinite(self.exact), self.exact, np.inf)

    def certainly(self, magnitude: float) -> Places:
        """Where the numbers are certainly that, or less that."""
        if not (known := self.off == 0).any():
            return np.False_
        return known & ((self.exact == magnitude) | (self.exact == -magnitude))

    def _vanishes(self) -> Places:
        """Where an engine that flushes may read a number that is not 0 as 0."""
        if not (self.stored and self.how.profile.flushes):
            return np.False_
        size = finite_magnitude(self.exact)
        return (size - self.off < self.how.sums.smallest_normal) & (size > 0)

    def _flushed(self) -> float | Float64Array:
        """The numbers that an engine loses where it flushes."""
        if not (vanishes := self._vanishes()).any():
            return 0.0
        return np.minimum(np.abs(self.exact), self.how.sums.smallest_normal) * vanishes

    def _unsure_sign(self, other: Tracked) -> Places:
        """Where an infinite number meets one whose sign is not sure."""
        if not (infinite := np.isinf(self.exact)).any():
            return np.False_
        return infinite & (np.abs(other.exact) <= other.off) & (other.off > 0)


_NONE = np.zeros(())


def _times(error: Float64Array, size: Float64Array) -> Float64Array:
    """The product, without a pass over the size where nothing is off."""
    return error * size if error.any() else _NONE


def read(
    name: str,
    array: Array,
    how: Rounding,
    *,
    recorded: bool = True,
    cache: FloatFormat | None = None,
) -> Tracked:
    """Numbers as they were stored.

    Those that were recorded may have had more digits; those of a cache are rounded to its format.
    """
    form = float_format(name, array)
    exact = to_numpy(array).astype(np.float64)
    off = _NONE
    if cache is not None and not cache.holds(form):
        finite, exact, form = np.isfinite(exact), read_in(exact, cache), cache
        off = np.where(finite & np.isinf(exact), np.inf, 0.0)
    if recorded and how.before is not None:
        off = off + input_error(exact, how.before)
    return Tracked(exact, off, off, how, form, stored=True)


def constant(number: ArrayLike, how: Rounding) -> Tracked:
    """Numbers that are known exactly, and rounded to the sums' format where they do not fit."""
    exact = np.asarray(number, np.float64)
    sums = how.sums
    error = sums.unit_roundoff * np.abs(exact) + sums.smallest_subnormal
    off = np.where((read_in(exact, sums) == exact) | np.isnan(exact), 0.0, error)
    return Tracked(exact, off, off, how, sums)
