"""How roundings add up, and what a format does to a number."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FloatFormat

Float64Array = NDArray[np.float64]


def gamma(n: int, u: float) -> float:
    r""":math:`\gamma_n`, the largest relative error of n roundings; infinite where n u is 1."""
    return n * u / (1 - n * u) if n * u < 1 else math.inf


def usual_growth(n: int, u: float) -> float:
    r""":math:`4 \sqrt n u`, which n roundings rarely exceed, or :math:`\gamma_n` where smaller."""
    return min(4 * math.sqrt(n) * u, gamma(n, u))


# How the largest and the usual error of n roundings grow.
GROWTHS = (gamma, usual_growth)


def compounded(*errors: float) -> float:
    r""":math:`\prod (1 + e) - 1` without cancellation: what successive relative errors make."""
    total = 0.0
    for error in errors:
        total += error + total * error
    return total


def inverse(error: float) -> float:
    """The relative error of the inverse of a number with a relative error."""
    return error / (1 - error) if error < 1 else math.inf


def read_in(stored: Float64Array, form: FloatFormat | None) -> Float64Array:
    """Numbers as an engine reads them that rounds them to a format first, to nearest."""
    if form is None:
        return stored
    dtype = np.dtype(getattr(ml_dtypes, form.name, form.name))
    with np.errstate(over="ignore"):
        return stored.astype(dtype).astype(np.float64)


def input_error(stored: Float64Array, form: FloatFormat) -> Float64Array:
    r"""How far numbers that were rounded to a format can be from what they were before.

    A rounding makes :math:`\tilde x = x (1 + d)`, :math:`|d| \le u`, of x, or errs by less than the
    smallest number, so that :math:`|x - \tilde x| \le u / (1 - u) |\tilde x| + \eta`. What is
    infinite may have been any large number.
    """
    u = form.unit_roundoff
    magnitude = np.where(np.isnan(stored), 0.0, np.abs(stored))
    return np.asarray(u / (1 - u) * magnitude + form.smallest_subnormal)


def finite_magnitude(array: Float64Array) -> Float64Array:
    """The magnitudes of the finite numbers, and 0 for the others."""
    magnitude = np.abs(array)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(magnitude.sum()):
            return np.asarray(magnitude)
    return np.where(np.isfinite(magnitude), magnitude, 0.0)
