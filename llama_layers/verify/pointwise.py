"""Rules for functions of single numbers: activations and caps.

In silu errors cancel, since it hardly moves beside its least value: a step-by-step analysis of
tracked numbers would bound it too loosely.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from llama_layers.arrays.dtypes import FloatFormat
from llama_layers.verify.roundoff import (
    Float64Array,
    compounded,
    finite_magnitude,
    gamma,
    inverse,
)
from llama_layers.verify.tracked import Tracked


def silu(x: Tracked) -> Tracked:
    r"""Compute x times its sigmoid, :math:`s(x) = x / (1 + e^{-x})`, in any of its forms.

    An exponential that errs by a relative :math:`2 u e` (e is `exp_ulps`) makes the sigmoid err by
    :math:`1 / (1 - 2 u e)` at most, whichever sign it has; sum, division and product add three
    roundings:

    .. math:: |\hat s - s| \le r (|s| + \Delta) + u e (|x| + \delta)(1 + r) + \Delta + \eta, \quad
        r = \frac{1 + \gamma_3}{1 - 2 u e} - 1

    The second term is for :math:`(1 + \tanh(x / 2)) / 2`, where an error of the hyperbolic tangent
    counts in full though the sigmoid is small. :math:`\Delta` is how far silu moves where x is off
    by :math:`\delta`: as far as at an end of that interval, since it falls or rises through all of
    it, or is convex, around its least value at -1.28.

    A profile that rounds each step of the sigmoid to a format with roundoff :math:`u_s` adds to
    :math:`1 + r` the factor

    .. math:: \frac{1 + u_s}{(1 - u_s) (1 - w)}, \quad
        w = \frac{u_s (1 + 2 u e)}{1 - 2 u e} \, \sigma(-x),

    of the quotient, of the sum, and of the exponential, which counts for as much as it is of the
    sum. Where the sum may overflow that format, silu may be zero. Nothing is said of infinite x.
    """
    how, u = x.how, x.how.sums.unit_roundoff
    ulps, form = how.profile.exp_ulps, how.step("sigmoid")
    form = None if form is None or form.holds(how.sums) else form
    exponential = 2 * u * ulps
    r: float | Float64Array = compounded(gamma(3, u), inverse(exponential))
    with np.errstate(all="ignore"):
        exact = _silu(x.exact)
        ends = (finite_magnitude(_silu(x.exact + e) - exact) for e in (-x.off, x.off))
        moved = np.maximum(*ends)
        size = finite_magnitude(exact)
        if form is not None:
            steps = _steps(x.exact - x.off, exponential, form)
            r = r + steps + r * steps
        error = r * (size + moved) + u * ulps * x.size * (1 + r)
        error = how.own * error + how.lost * (1 + x.size) + moved
        if form is not None:
            error = error + form.smallest_subnormal * x.size
            vanishes = (1 + np.exp(x.off - x.exact)) * (1 + r) >= form.max
            error = np.where(vanishes, error + size, error)
        fits = (size + error < how.sums.max) & np.isfinite(x.off) & ~np.isinf(x.exact)
        error = np.where(fits, np.where(x.certainly(0), 0.0, error), np.inf)
    return Tracked(exact, error, error, how, how.sums)


def tanh(x: Tracked) -> Tracked:
    """The hyperbolic tangent, within `exp_ulps`: it moves as far as at an end of an interval."""
    none = np.zeros(())
    right = x.with_errors((none, none)).apply(np.tanh)

    def error(e: Float64Array) -> Float64Array:
        ends = (np.abs(np.tanh(x.exact + end) - right.exact) for end in (-e, e))
        moved = np.maximum(*ends) * (1 + 2 * x.how.unit * x.how.profile.exp_ulps)
        return np.where(np.isinf(e), np.inf, moved + right.off)

    with np.errstate(all="ignore"):
        return right.with_errors(x.errors(error))


def gelu_tanh(x: Tracked) -> Tracked:
    r"""Compute gelu with a hyperbolic tangent, in any of its forms.

    .. math:: g(x) = x \, s(x), \quad s(x) = \frac{1 + \tanh z}{2} = \frac{1}{1 + e^{-2z}}, \quad
        z = \sqrt{2 / \pi} \, (x + 0.044715 x^3)

    The tangent errs by :math:`2 u e`, which the sum takes over whole though s is small (e is
    `exp_ulps`); the exponential errs by that relative to itself, and so does s, at most. Both are
    allowed, and the roundings of either. All terms of z have one sign, and in any order it has no
    more than one rounding more than in the order above. A profile with a table rounds x and g(x).
    """
    x = x.step("gelu")
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    with np.errstate(all="ignore"):
        u = x.how.sums.unit_roundoff
        size = finite_magnitude(inner.exact)
        inner = inner.with_errors(inner.errors(lambda e: e + u * (size + e)))
        share = (1 + tanh(inner)) * 0.5
        r = compounded(gamma(3, u), inverse(2 * u * x.how.profile.exp_ulps))
        size = finite_magnitude(share.exact)
        share = share.with_errors(share.errors(lambda e: e + r * (size + e)))
    return (x * share).step("gelu")


ACTS = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh}
"""What is made of the gate, by the ``hidden_act`` of a config."""


def divided(y: Tracked, number: float) -> Tracked:
    """Divide by a number, or multiply with its reciprocal, which has one rounding more."""
    quotient = y / number
    if number == 1:
        return quotient
    with np.errstate(all="ignore"):
        u, size = y.how.sums.unit_roundoff, finite_magnitude(quotient.exact)
        return quotient.with_errors(quotient.errors(lambda e: e + u * (size + e)))


def soft_capped(y: Tracked, cap: float, step: str) -> Tracked:
    """Compute cap tanh(y / cap), of which each operation is a step of a rounding profile."""
    return (tanh((y / cap).step(step)).step(step) * cap).step(step)


def gated(gate: Tracked, up: Tracked, act: Callable[[Tracked], Tracked] = silu) -> Tracked:
    """Multiply act(gate) with up, in any order: products may underflow in another place."""
    product = act(gate).step("silu") * up
    with np.errstate(all="ignore"):
        lost = np.where(product.off == 0, 0.0, gate.how.lost * (gate.size + up.size))
        return product.with_errors(product.errors(lambda e: e + lost))


def _silu(x: Float64Array) -> Float64Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _steps(x: Float64Array, exponential: float, form: FloatFormat) -> Float64Array:
    """The relative error of sigmoids of x or more by roundings of their steps.

    An exponential that underflows is off by no more of the sum, which is 1 or more, than the
    smallest number.
    """
    u = form.unit_roundoff
    off = u * (1 + exponential) / (1 - exponential) / (1 + np.exp(x)) + form.smallest_subnormal
    return np.where(off < 1, (1 + u) / ((1 - u) * (1 - off)), np.inf) - 1
