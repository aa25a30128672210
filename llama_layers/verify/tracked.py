r"""Numbers that carry a bound on the error of any computation of them.

A `Tracked` array has the exact numbers in float64, and how far off they can be if an engine
computes them in the stated formats (running error analysis: Higham, "Accuracy and Stability of
Numerical Algorithms", 2nd edition, SIAM 2002, section 3.3). A formula over tracked numbers is
therefore both the operation and its bound, right or wrong:

>>> import numpy as np
>>> from llama_layers.verify.profiles import Rounding
>>> from llama_layers.verify.tracked import read
>>> x = read(np.float32([[3.0, 4.0]]), Rounding("float32", "float32"))
>>> norm = x * ((x * x).mean() + 1e-5).rsqrt()
>>> norm.exact.round(3), norm.off.max() < 1e-6
(array([[0.849, 1.131]]), np.True_)

With u the unit roundoff of the sums' format, each operation adds the errors that it inherits and
:math:`u (|y| + e)` for its own rounding, where y is its exact result and e what it inherited; and
what underflow loses. (u is that of float64 larger, since the exact result is computed in
float64 itself, which matters where float64 is judged.) A product with 0 or 1 and a sum with 0 are
not rounded. Operations on many numbers, and those in which errors cancel, have rules with a
derivation of their own.

Two errors are carried: `off`, which no correct computation exceeds, and `usual`, which rounding
errors of random sign rarely exceed: :math:`4 \sqrt n u` instead of
:math:`\gamma_n = n u / (1 - n u)`. An infinite error means that nothing can be said, since the
computation may overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    carried,
    finite_magnitude,
    gamma,
    input_error,
    read_in,
    usual_growth,
)
from llama_layers.verify.profiles import Rounding

GROWTHS = (gamma, usual_growth)
# Rows of a matrix that are held in float64 at a time.
BLOCK_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Tracked:
    """Numbers, and how far an engine's can be from them.

    Attributes
    ----------
    exact : ndarray of float64
        The exact numbers, computed in float64.
    off : ndarray of float64
        The largest error, of a shape that broadcasts to that of `exact`.
    usual : ndarray of float64
        The error that is rarely exceeded.
    how : Rounding
        The formats of the engine.
    form : FloatFormat
        The format that holds the engine's numbers.
    """

    exact: Float64Array
    off: Float64Array
    usual: Float64Array
    how: Rounding
    form: FloatFormat

    # Sums and products of two numbers.

    def __add__(self, other: Any) -> Tracked:
        """The sum; one with 0 is exact, and so is 0 itself, since sums do not underflow."""
        b = self._number(other)
        with np.errstate(all="ignore"):
            exact = self.exact + b.exact
            lost = self._flushed() + b._flushed()
            # Two numbers that cancel exactly are flushed both, or neither.
            lost = np.where((exact == 0) & (self.off == 0) & (b.off == 0), 0.0, lost)
            errors = self._errors(lambda e, f: e + f + lost, b)
            return self._rounded(exact, errors, ~(self._is(0) | b._is(0)), 0.0, self, b)

    def __mul__(self, other: Any) -> Tracked:
        """The product; one with 0 or 1 is exact."""
        b = self._number(other)
        with np.errstate(all="ignore"):
            exact = self.exact * b.exact
            size, size_b = finite_magnitude(self.exact), finite_magnitude(b.exact)
            lost = self._flushed() * size_b + size * b._flushed()
            unsure = self._unsure_sign(b) | b._unsure_sign(self)

            def error(e: Float64Array, f: Float64Array) -> Float64Array:
                return np.where(unsure, np.inf, e * size_b + size * f + e * f + lost)

            inexact = ~(self._is(0) | b._is(0) | self._is(1) | b._is(1))
            tiny = self.how.sums.smallest_subnormal * inexact
            return self._rounded(exact, self._errors(error, b), inexact, tiny, self, b)

    def __truediv__(self, other: Any) -> Tracked:
        """The quotient; infinitely off where the divisor may be 0 and is not."""
        b = self._number(other)
        with np.errstate(all="ignore"):
            exact = self.exact / b.exact
            size, size_b = finite_magnitude(exact), finite_magnitude(b.exact)
            lost = self._flushed() / size_b

            def error(e: Float64Array, f: Float64Array) -> Float64Array:
                left = np.where(np.isfinite(b.exact), size_b - f, np.inf)
                quotient = (e + size * f) / np.maximum(left, 0.0) + lost
                return np.where(b._vanishes() | ((left <= 0) & (f > 0)), np.inf, quotient)

            inexact = ~(self._is(0) | b._is(1))
            tiny = self.how.sums.smallest_subnormal * inexact
            return self._rounded(exact, self._errors(error, b), inexact, tiny)

    def __neg__(self) -> Tracked:
        """The numbers with the other sign, which is exact."""
        return replace(self, exact=-self.exact)

    def __sub__(self, other: Any) -> Tracked:
        """The difference, as a sum."""
        return self + -self._number(other)

    def __rsub__(self, other: Any) -> Tracked:
        """The difference from a number."""
        return self._number(other) - self

    def __rtruediv__(self, other: Any) -> Tracked:
        """The quotient of a number."""
        return self._number(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Tracked:
        """Some of the numbers."""
        return self.moved(lambda array: array[index])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return self.exact.shape

    # Functions of one number.

    def sqrt(self) -> Tracked:
        """The square root, itself within `root_ulps` units in the last place."""
        with np.errstate(all="ignore"):
            exact = np.sqrt(self.exact)

            def error(e: Float64Array) -> Float64Array:
                part = np.minimum(e / finite_magnitude(self.exact), 1.0)
                return np.where(self.exact == 0, np.sqrt(e), -exact * np.expm1(np.log1p(-part) / 2))

            errors = self._errors(error)
            return self._rounded(exact, errors, 2.0 * self.how.profile.root_ulps, 0.0)

    def rsqrt(self) -> Tracked:
        """1 over the square root, within `root_ulps` units in the last place.

        A root and a division that are each rounded correctly are within 1.
        """
        with np.errstate(all="ignore"):
            exact = 1 / np.sqrt(self.exact)

            def error(e: Float64Array) -> Float64Array:
                part = e / np.where(np.isfinite(self.exact), self.exact, np.inf)
                grown = exact * np.expm1(-np.log1p(-np.minimum(part, 1.0)) / 2)
                return np.where(e == 0, 0.0, np.where(part >= 1, np.inf, grown))

            errors = self._errors(error)
            return self._rounded(exact, errors, 2.0 * self.how.profile.root_ulps, 0.0)

    def mean(self) -> Tracked:
        r"""The mean of each row, in any order of summation, with the axis kept.

        The sum of n numbers has n - 1 roundings, the division by n one, or two where it is a
        product with the inverse: :math:`|\hat m - m| \le \frac 1 n \sum e_i + \gamma_{n+1}
        \frac 1 n \sum (|x_i| + e_i)`. Errors that are inherited usually cancel, too, to
        :math:`\frac 4 n \sqrt{\sum e_i^2}`.
        """
        n = self.exact.shape[-1]
        with np.errstate(all="ignore"):
            # In another order than a float64 result is summed in, which is not its own judge.
            exact = self.exact[..., ::-1].mean(axis=-1, keepdims=True)
            size = np.mean(finite_magnitude(self.exact) + self.off, axis=-1, keepdims=True)
            lost = np.mean(self._flushed() + np.zeros(self.shape), axis=-1, keepdims=True)
            off = np.broadcast_to(self.off, self.shape).mean(axis=-1, keepdims=True)
            squares = np.square(self.usual + np.zeros(self.shape)).sum(axis=-1, keepdims=True)
            usual = np.minimum(4 * np.sqrt(squares) / n, off)
            errors = (
                e + self.how.own * grow(n + 1, self.how.sums.unit_roundoff) * size + lost
                for e, grow in zip((off, usual), GROWTHS, strict=True)
            )
            # The sum may overflow though the mean does not.
            most = n * size * (1 + gamma(n, self.how.sums.unit_roundoff))
            most, usually = (np.where(most < self.how.sums.max, e, np.inf) for e in errors)
            tiny = self.how.sums.smallest_subnormal * (size > 0)
            return self._rounded(exact, (most, usually), 0.0, tiny)

    def matmul(self, weight: Any, bias: Any | None = None) -> Tracked:
        r"""Products with the rows of a matrix [N, K], and a bias [N] that is one more term.

        With n terms an element, :math:`A = |x| |W|^\top + |b|`, and x off by :math:`\delta`, so
        that a product is off by :math:`\Delta = \delta |W|^\top`,

        .. math:: |\hat y - y| \le \gamma_n (A + \Delta) + \Delta + \eta

        in any order of summation (Higham, section 3.5). Where the result's format is narrower than
        that of the sums, a product that is rounded before the bias is added is allowed too, which
        costs another :math:`u_o |x W^\top|` and :math:`1 + u_o`. :math:`\eta` is what products that
        underflow can lose. Where every product is zero, so is the error.
        """
        w, b = to_numpy(weight), None if bias is None else to_numpy(bias).astype(np.float64)
        rows = self.moved(lambda array: array.reshape(-1, self.shape[-1]))
        arrays = tuple(np.empty((len(rows.exact), len(w))) for _ in range(3))
        for start in range(0, len(w), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            parts = rows._products(w[block].astype(np.float64), None if b is None else b[block])
            for array, part in zip(arrays, parts, strict=True):
                array[:, block] = part
        exact, off, usual = (array.reshape(*self.shape[:-1], len(w)) for array in arrays)
        return Tracked(exact, off, usual, self.how, self.how.sums)

    def _products(
        self, w: Float64Array, b: Float64Array | None
    ) -> tuple[Float64Array, Float64Array, Float64Array]:
        """The exact products with some rows of a matrix, and their errors; see `matmul`."""
        x, sums, out = self.exact, self.how.sums, self.how.out
        n = x.shape[1] + (b is not None)
        off, size_w = np.broadcast_to(self.off, x.shape), finite_magnitude(w)
        size = finite_magnitude(x) + off
        with np.errstate(all="ignore"):
            product = np.ascontiguousarray(x[:, ::-1]) @ np.ascontiguousarray(w[:, ::-1]).T
            exact = product if b is None else product + b
            magnitude = size @ size_w.T
            if b is not None:
                magnitude += finite_magnitude(b)
            underflow: Any = n * sums.smallest_subnormal
            if self.how.profile.flushes:
                lost = size.sum(axis=1)[:, None] + size_w.sum(axis=1) + 2 * n
                underflow = np.maximum(underflow, sums.smallest_normal * lost)
            # What the float64 product itself can be off by, which matters for float64 alone.
            own = gamma(n, FLOATS["float64"].unit_roundoff) * magnitude
            errors = []
            for grow, moved in zip(GROWTHS, carried((off, size_w.T)), strict=True):
                error = grow(n, sums.unit_roundoff) * magnitude + moved
                overflows = ~(magnitude + error < sums.max)
                error = error + underflow
                if b is not None and not out.holds(sums):
                    error = error * (1 + out.unit_roundoff) + out.unit_roundoff * np.abs(product)
                    overflows |= np.isfinite(product) & (np.abs(product) + error >= out.max)
                error += own
                error[overflows] = np.inf
                error[(magnitude == 0) & (sums.name != "float64")] = 0.0
                errors.append(error)
        return exact, errors[0], errors[1]

    # What becomes of the numbers.

    def to(self, form: FloatFormat | None) -> Tracked:
        """The numbers rounded to a format, unless it holds them as they are."""
        if form is None or form.holds(self.form):
            return self
        with np.errstate(all="ignore"):
            size = finite_magnitude(self.exact)
            same = self.off == 0
            if same.any():
                same = same & (read_in(self.exact, form) == self.exact)

            def error(e: Float64Array) -> Float64Array:
                step = form.unit_roundoff * (size + e) + form.smallest_subnormal
                grown = e + np.where(same, 0.0, step)
                return np.where(size + grown < form.max, grown, np.inf)

            return replace(self._with(self._errors(error)), form=form)

    def step(self, name: str) -> Tracked:
        """The numbers rounded as the profile rounds the step of that name, if it does."""
        return self.to(self.how.step(name))

    def moved(self, move: Callable[[Float64Array], Float64Array]) -> Tracked:
        """The numbers in other places: reshaped, permuted, selected or repeated."""
        parts = [np.broadcast_to(e, self.shape) for e in (self.off, self.usual)]
        off = move(parts[0])
        usual = off if self.usual is self.off else move(parts[1])
        return replace(self, exact=move(self.exact), off=off, usual=usual)

    def bound(self) -> Bound:
        """The bound of a result, rounded to its format."""
        last = self.to(self.how.out)
        size = finite_magnitude(last.exact)
        limits = (np.where(size + e < last.how.out.max, e, np.inf) for e in (last.off, last.usual))
        return Bound(last.exact, *limits)

    # How it is done.

    def _number(self, other: Any) -> Tracked:
        return other if isinstance(other, Tracked) else constant(other, self.how)

    def _with(self, errors: tuple[Float64Array, ...]) -> Tracked:
        return replace(self, off=errors[0], usual=errors[1])

    def _errors(self, rule: Callable[..., Float64Array], *others: Tracked) -> tuple[Any, Any]:
        """The largest and the usual error by a rule for the errors of operands."""
        operands = (self, *others)
        most = rule(*(number.off for number in operands))
        if all(number.usual is number.off for number in operands):
            return most, most
        return most, rule(*(number.usual for number in operands))

    def _rounded(
        self,
        exact: Float64Array,
        errors: tuple[Any, Any],
        roundings: Any,
        lost: Any,
        *operands: Tracked,
    ) -> Tracked:
        """A result with errors from its operands, its own roundings, and what underflow loses.

        Finite operands that are given must have a finite result.
        """
        size, sums = finite_magnitude(exact), self.how.sums
        infinite = np.isinf(exact)
        for operand in operands:
            infinite = infinite & np.isfinite(operand.exact)
        found: list[Float64Array] = []
        for e in errors if errors[1] is not errors[0] else errors[:1]:
            error = np.asarray(e + roundings * self.how.unit * (size + e) + lost)
            if self.how.profile.flushes:
                tiny = sums.smallest_normal
                error = error + np.where(size - error < tiny, np.minimum(size, tiny), 0.0)
            found.append(np.where(~infinite & (size + error < sums.max), error, np.inf))
        return Tracked(exact, found[0], found[-1], self.how, sums)

    def _is(self, magnitude: float) -> Any:
        """Where the numbers are certainly that, or less that."""
        return (np.abs(self.exact) == magnitude) & (self.off == 0)

    def _vanishes(self) -> Any:
        """Where an engine that flushes may take a number that is not 0 for 0."""
        if not self.how.profile.flushes:
            return np.False_
        size = finite_magnitude(self.exact)
        return (size - self.off < self.how.sums.smallest_normal) & (size > 0)

    def _flushed(self) -> Any:
        """What is lost where an engine flushes."""
        tiny = np.minimum(finite_magnitude(self.exact), self.how.sums.smallest_normal)
        return np.where(self._vanishes(), tiny, 0.0)

    def _unsure_sign(self, other: Tracked) -> Any:
        """Where an infinite number meets one whose sign is not sure."""
        return np.isinf(self.exact) & (np.abs(other.exact) <= other.off) & (other.off > 0)


def read(array: Any, how: Rounding, *, recorded: bool = True, name: str = "x") -> Tracked:
    """Numbers as they were stored; those that were recorded may have had more digits."""
    form = float_format(name, array)
    exact = to_numpy(array).astype(np.float64)
    zero = np.zeros(())
    off = zero if how.before is None or not recorded else input_error(exact, how.before)
    return Tracked(exact, off, off, how, form)


def constant(number: Any, how: Rounding) -> Tracked:
    """Numbers that are known exactly, and rounded to the sums' format where they do not fit."""
    exact = np.asarray(number, np.float64)
    sums = how.sums
    error = sums.unit_roundoff * np.abs(exact) + sums.smallest_subnormal
    off = np.where(read_in(exact, sums) == exact, 0.0, error)
    return Tracked(exact, off, off, how, sums)
