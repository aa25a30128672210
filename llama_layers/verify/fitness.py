"""How well a hypothesis predicts an array: what it leaves, and how likely that is as rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import wide
from llama_layers.verify.roundoff import Float64Array

# Elements whose usual error is less than this share of the median one's are taken to have so much.
_FLOOR = 1e-3
# What changes less than that of what is usual changes nothing.
_NOTHING = 0.01
# The share of what a hypothesis changes that may be left of it, in either direction, beside
# chance, and how many standard errors chance may be.
_PART, _CHANCE = 0.1, 5.0


@dataclass(frozen=True)
class Fitness:
    r"""What a hypothesis leaves of an array's errors.

    If errors are normally distributed, each as wide as a constant times a scale :math:`u_i` that is
    the same for all hypotheses, the constant that fits best is the root mean square :math:`s` of
    :math:`e_i / u_i`, and the logarithm of the likelihood of n errors is :math:`-n \log s`, but for
    a constant. So a hypothesis gains nothing by a wider limit.
    """

    error: float
    """The root of the sum of squared errors; infinite if there is NaN or Inf on one side only."""
    relative: float
    """The root mean square of errors over those that are usual with the hypothesis."""
    scaled: float
    """The same over a scale that is the same for all hypotheses."""

    @classmethod
    def of(cls, array: np.ndarray, bound: Bound, scale: Float64Array) -> Fitness:
        """Of an array where a bound has limits."""
        error, judged = np.abs(residual(array, bound)), ~np.isinf(bound.limit)
        error, usual = error[judged], np.minimum(bound.usual, bound.limit)[judged]
        if not error.size:
            return cls(0.0, 0.0, 0.0)
        with np.errstate(over="ignore"):
            whole = float(np.sqrt(np.sum(np.square(error))))
        scaled = _root_mean_square(error, scale[judged])
        return cls(whole, _root_mean_square(error, floored(usual)), scaled)

    def surprise(self, floor: float) -> float:
        """Minus the logarithm of the likelihood of an element, on the average.

        Errors below a floor are all as likely: our own numbers err, too.
        """
        return math.log(max(self.scaled, floor))


def _root_mean_square(error: Float64Array, scale: Float64Array) -> float:
    with np.errstate(over="ignore"):
        return float(np.sqrt(np.mean(np.square(error / scale))))


def floored(usual: Float64Array) -> Float64Array:
    """Usual errors, none of them nothing or infinite, to hold errors against."""
    some = usual[(usual > 0) & np.isfinite(usual)]
    middle = float(np.median(some)) if some.size else 1.0
    return np.maximum(np.where(np.isfinite(usual), usual, middle), _FLOOR * middle)


def residual(array: np.ndarray, bound: Bound) -> Float64Array:
    """The errors; infinite where there is NaN or Inf on one side only."""
    values = wide(array)
    with np.errstate(invalid="ignore", over="ignore"):
        error = values - bound.exact
        same = (values == bound.exact) | (np.isnan(values) & np.isnan(bound.exact))
        return np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))


def leaves_a_part(array: np.ndarray, bound: Bound, right: Float64Array) -> bool:
    """Whether an array shows less of what a hypothesis changes than it should, or more.

    What is left of the array must not go with the difference between the hypothesis and what is
    right, in no token and in no channel: what is rounding has nothing to do with it.
    """
    error = residual(array, bound)
    with np.errstate(invalid="ignore", over="ignore"):
        change = bound.exact - right
        weight = 1 / np.maximum(bound.usual, 1e-300)
        judged = np.isfinite(error) & np.isfinite(change) & np.isfinite(weight) & (bound.usual > 0)
        e, d = (np.where(judged, y * weight, 0.0) for y in (error, change))
        size = float(np.sum(d * d))
        if not math.isfinite(size) or np.abs(d).max() < _NOTHING:
            return False
        every = tuple(range(e.ndim))
        return any(_goes_with(e, d, axes) for axes in (every, every[2:], every[:2]))


def _goes_with(e: Float64Array, d: Float64Array, axes: tuple[int, ...]) -> bool:
    """Whether somewhere, summed over some axes, errors have a part of a change in them."""
    size = np.sum(d * d, axis=axes)
    slope = np.sum(e * d, axis=axes) / np.maximum(size, 1e-300)
    chance = np.sqrt(float(np.mean(e * e)) / np.maximum(size, 1e-300))
    return bool((np.abs(slope) > _PART + _CHANCE * chance).any())
