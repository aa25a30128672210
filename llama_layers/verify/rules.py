"""Rules for what a step-by-step analysis of tracked numbers would bound too loosely, or too slowly.

Products of matrices are computed at once, in any order of summation. In softmax errors cancel: an
error that all scores share changes no probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.profiles import Rounding
from llama_layers.verify.ranks import Ranks
from llama_layers.verify.roundoff import (
    GROWTHS,
    Float64Array,
    compounded,
    finite_magnitude,
    inverse,
)
from llama_layers.verify.tracked import Tracked

# Rows of a matrix that are held in float64 at a time.
BLOCK_ROWS = 1024


def matmul(
    x: Tracked, w: np.ndarray, bias: np.ndarray | None = None, *, summed: bool = False
) -> Tracked:
    """Products of x [..., K] with the rows of a matrix [N, K], some at a time; see `dot`.

    Where ranks sum them, see `Ranks`.
    """
    ranks = Ranks.of(x.how, bias is not None) if summed else None
    b = None if bias is None else bias.astype(np.float64)
    rows = x.moved(lambda array: array.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    arrays = [np.empty((len(rows.exact), len(w))) for _ in range(3)]
    for start in range(0, len(w), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        none = np.zeros(())
        matrix = Tracked(w[block].astype(np.float64), none, none, x.how, x.how.sums)
        part = dot(rows, matrix, None if b is None else b[block], ranks=ranks)
        for array, values in zip(arrays, (part.exact, part.off, part.usual), strict=True):
            array[:, block] = values
    exact, off, usual = (array.reshape(*x.shape[:-1], len(w)) for array in arrays)
    return Tracked(exact, off, usual, x.how, x.how.sums if ranks is None else ranks.form)


def dot(
    x: Tracked,
    rows: Tracked,
    bias: Float64Array | None = None,
    scale: float | None = None,
    ranks: Ranks | None = None,
) -> Tracked:
    r"""Products of x [..., S, K] with rows [..., N, K], a bias [N] added, or scaled.

    With n products an element, of factors that are off by :math:`\delta` and :math:`\epsilon`,
    :math:`A = (|x| + \delta) (|W| + \epsilon)^\top` and what the products are off by,
    :math:`\Delta = \delta |W|^\top + (|x| + \delta) \epsilon^\top`,

    .. math:: |\hat y - y| \le \gamma_n A + \Delta + \eta

    in any order of summation, with fused multiply-adds or not (Higham, section 3.5). Usually errors
    cancel: :math:`4 \sqrt n u` instead of :math:`\gamma_n`, and :math:`4 \sqrt{\sum}` of the
    squares instead of the sums in :math:`\Delta`. Where every product is zero, so is the error.
    :math:`\eta` is what products lose that underflow; an engine that flushes may lose factors, too.

    A bias is one more term of the sum. Where the result's format is narrower than that of the sums,
    a product that is rounded before the bias is added is allowed, too, which costs another
    :math:`u_o |x W^\top|` and :math:`1 + u_o`.

    A scale is itself rounded, and multiplies before or after the sum, in two roundings; two more
    allow its root in both factors: n + 4. The products are rounded as the profile rounds "scores",
    before and after they are scaled. What ranks add is in `Ranks`.
    """
    how, sums, out = x.how, x.how.sums, x.how.out
    n = x.shape[-1] + (bias is not None) + 4 * (scale is not None)
    size_x, size_w = x.size, rows.size
    form = sums if ranks is None else ranks.form
    with np.errstate(all="ignore"):
        # In another order than the result is summed in: a float64 result is not its own judge.
        product = _contiguous(x.exact) @ _contiguous(rows.exact).swapaxes(-1, -2)
        exact = product if bias is None else product + bias
        magnitude = size_x @ size_w.swapaxes(-1, -2)
        if bias is not None:
            magnitude += finite_magnitude(bias)
        underflow: float | Float64Array = n * how.lost
        if how.profile.flushes or scale is not None:
            underflow = how.lost * (
                size_x.sum(-1)[..., None] + size_w.sum(-1)[..., None, :] + 2 * n
            )
        if ranks is not None:
            underflow = underflow + ranks.lost
        zero = (magnitude == 0) & (sums.name != "float64")
        errors = []
        for grow, moved in zip(GROWTHS, _moved(x, rows, size_x, size_w), strict=True):
            growth = how.own * grow(n, sums.unit_roundoff)
            if ranks is not None:
                growth = ranks.grown(growth, grow)
            error = growth * magnitude + moved
            fits = max(1.0, abs(scale or 0.0)) * (magnitude + error) < min(sums.max, form.max)
            error = error + underflow
            if bias is not None and not out.holds(sums):
                error = error * (1 + out.unit_roundoff) + out.unit_roundoff * np.abs(product)
                fits &= ~np.isfinite(product) | (np.abs(product) + error < out.max)
            error[~fits] = np.inf
            error[zero] = 0.0
            errors.append(error)
        if scale is None:
            return Tracked(exact, errors[0], errors[1], how, form)
        rounded = Tracked(exact, errors[0], errors[1], how, sums).step("scores")
        most, usual = (
            np.where(zero, 0.0, e * abs(scale) + underflow) for e in (rounded.off, rounded.usual)
        )
        return Tracked(exact * scale, most, usual, how, sums).step("scores")


def _contiguous(array: Float64Array) -> Float64Array:
    return np.ascontiguousarray(array[..., ::-1])


def _moved(
    x: Tracked, rows: Tracked, size_x: Float64Array, size_w: Float64Array
) -> tuple[float | Float64Array, float | Float64Array]:
    """The errors of products that errors of x and of the rows cause, at most and usually."""
    pairs = []
    if x.off.any():
        exact = finite_magnitude(rows.exact) if rows.off.any() else size_w
        pairs.append([(np.broadcast_to(e, x.shape), exact) for e in (x.off, x.usual)])
    if rows.off.any():
        pairs.append([(size_x, np.broadcast_to(e, rows.shape)) for e in (rows.off, rows.usual)])
    most = sum((a @ b.swapaxes(-1, -2) for (a, b), _ in pairs), 0.0)
    squares = sum((np.square(a) @ np.square(b).swapaxes(-1, -2) for _, (a, b) in pairs), 0.0)
    return most, np.minimum(4 * np.sqrt(squares), most)


@dataclass(frozen=True, eq=False)
class Weights:
    r"""The softmax of the scores in each row, before an engine divides by the sum.

    With :math:`p_t = e^{a_t - m} / \sum_{t'} e^{a_{t'} - m}`, m the largest score, and scores that
    err by :math:`\alpha_t`, the exponential of key t errs by a relative

    .. math:: \eta_t = e^{\Delta_t} (1 + 2 u e)(1 + \rho) - 1, \quad
        \Delta_t = \alpha_t + u (|a_t - m| + \alpha_t + 2 \max \alpha),

    where e is `exp_ulps` and :math:`\rho` the error of exponentials that rescale what was summed
    (online softmax: T. Dao et al., "FlashAttention", arXiv:2205.14135), one for each block of keys.
    (Online, the arguments of all exponentials that a key meets add up to :math:`a_t - m`.) An error
    of the largest score, which all keys share, cancels. P. Blanchard, D. Higham and N. Higham bound
    the same algorithm in one format ("Accurately computing the log-sum-exp and softmax functions",
    IMA Journal of Numerical Analysis 41, 2021).
    """

    p: Float64Array
    """The probabilities."""
    grown: tuple[Float64Array, Float64Array]
    """By how much each grows if its exponential errs by most, or usually, and no other does."""
    unlimited: NDArray[np.bool_]
    """Rows without a bound, [..., S, 1]: with NaN, infinity, or no finite score."""
    allowed: NDArray[np.bool_] | None
    """The keys that may be seen, [..., S, T], or None; a row without any has exact zeros."""
    blocks: int
    """How often an engine rescales."""
    how: Rounding

    @classmethod
    def of(cls, scores: Tracked, allowed: NDArray[np.bool_] | None, blocks: int = 0) -> Weights:
        """The softmax of scores [..., S, T] over the keys that are allowed."""
        how, u, ulps = scores.how, scores.how.sums.unit_roundoff, scores.how.profile.exp_ulps
        with np.errstate(all="ignore"):
            visible = scores.exact != -np.inf
            if allowed is not None:
                visible = visible & allowed
            above = np.where(visible, scores.exact, -np.inf)
            largest = above.max(axis=-1, keepdims=True, initial=-np.inf)
            above = above - np.where(largest == -np.inf, 0.0, largest)
            e = np.exp(above)
            total = e[..., ::-1].sum(axis=-1, keepdims=True)
            distance = np.where(visible, np.abs(above), 0.0)
            unlimited = ~np.isfinite(total)
            grown = []
            for error, grow in zip((scores.off, scores.usual), GROWTHS, strict=True):
                error = np.where(visible, error, 0.0)
                most = error.max(axis=-1, keepdims=True, initial=0.0)
                delta = error * (1 + u) + u * (distance + 2 * most)
                rescaled = grow(math.ceil(2 * ulps + 1) * blocks, u)
                exponential = compounded(2 * u * ulps, rescaled)
                growth = e * np.expm1(np.minimum(delta, 1.0))
                if (far := delta > 1).any():
                    growth[far] = np.exp(above[far] + delta[far]) - e[far]
                growth = growth * (1 + exponential) + e * exponential
                grown.append(growth / np.maximum(total, 1.0))
                # Errors beyond all bounds stay usual where few bits are to blame, no overflow.
                overflows = ~np.isfinite(most)
            # Without a key but minus infinity an engine divides 0 by 0, unless the mask says so.
            empty = False if allowed is None else ~allowed.any(axis=-1, keepdims=True)
            unlimited |= overflows | ~visible.any(axis=-1, keepdims=True) & ~np.asarray(empty)
            p = e / np.where(total == 0, 1.0, total)
        return cls(p, (grown[0], grown[1]), unlimited, allowed, blocks, how)

    def probabilities(self) -> Tracked:
        r"""The probabilities.

        The sum of n numerators, all positive, errs by :math:`r = \sum_t p_t \eta_t` from these and
        by :math:`\gamma_n` from summing; a division, or a product with the inverse, is within 2
        roundings:

        .. math:: |\hat p_t - p_t| \le
            \frac{p_t \eta_t + p_t r + \kappa p_t (1 + \eta_t)}{1 - r} + \eta,
            \quad \kappa = \frac{(1 + u)^2}{1 - \gamma_n} - 1
        """
        n, u, lost = self.p.shape[-1], self.how.sums.unit_roundoff, self.how.lost
        hidden = False if self.allowed is None else ~self.allowed & ~self.unlimited
        errors = []
        with np.errstate(all="ignore"):
            for grow, grown in zip(GROWTHS, self.grown, strict=True):
                share = self._share(grown)
                kappa = compounded(inverse(grow(n, u)), u, u)
                error = grown + self.p * share + kappa * (self.p + grown)
                error = self.how.own * error / np.where(share < 1, 1 - share, 0.0) + 2 * lost
                error = np.where(self.unlimited | np.isnan(error), np.inf, error)
                errors.append(np.where(hidden, 0.0, error))
        return Tracked(self.p, errors[0], errors[1], self.how, self.how.sums)

    def weigh(self, v: Tracked) -> Tracked:
        r"""The values v [..., T, D] weighed, normalised before or after, or block by block.

        For exact sums of inexact exponentials

        .. math:: \tilde y - y = \frac{\sum_t p_t \varepsilon_t (v_t - y)}{1 + \sum_t p_t
            \varepsilon_t}, \quad |\tilde y - y| \le \frac{\sum_t p_t \eta_t |v_t| + |y| r}{1 - r}.

        Both sums have T terms that are rescaled N times, for N blocks; the quotient (or the product
        with the inverse) takes 2 roundings more, and where probabilities are rounded to a format of
        roundoff :math:`u_p`, before they are normalised or after, one of those:

        .. math:: |\hat y - \tilde y| \le \Gamma \, \frac{\sum_t p_t (1 + \eta_t) |v_t|}{1 - r},
            \quad \Gamma = \frac{1 + \gamma_{T + N}}{1 - \gamma_{T + N}} (1 + u)^2 (1 + u_p) - 1

        Sums that are kept in a narrow format ("weighted_sums") have two roundings for each key: one
        where it is added, one where what was summed is rescaled. Values that are off by
        :math:`\delta_t` add :math:`\sum_t p_t (1 + \eta_t) \delta_t / (1 - r)`, and are
        :math:`|v_t| + \delta_t` in the other terms. Nothing is said where r is 1 or more, or where
        the result is not finite.
        """
        how, sums = self.how, self.how.sums
        n, u, lost = v.shape[-2], sums.unit_roundoff, self.how.lost
        forms = [how.step(name) for name in ("probabilities", "kv_cache", "weighted_sums")]
        *factors, kept = (None if f is None or f.holds(sums) else f for f in forms)
        each = [form for form in factors if form is not None]
        size = np.broadcast_to(v.size, v.shape)
        off = np.broadcast_to(v.off, v.shape)
        empty = False if self.allowed is None else ~self.allowed.any(axis=-1, keepdims=True)
        with np.errstate(all="ignore"):
            exact = _contiguous(self.p) @ np.ascontiguousarray(v.exact[..., ::-1, :])
            magnitude = self.p @ size
            total = size.sum(axis=-2, keepdims=True)
            # Exponentials, products and quotients can all underflow, and lose so much at most.
            underflow = 4 * lost * (total + n * (np.abs(exact) + 1))
            for form in each:
                underflow += 2 * form.smallest_subnormal * (total + 1)
            if kept is not None:
                underflow += 2 * n * kept.smallest_subnormal
            errors = []
            for usual, grow in enumerate(GROWTHS):
                growth = grow(n + self.blocks, u)
                units = [form.unit_roundoff for form in each]
                factor = compounded(growth, inverse(growth), u, u, *units)
                if kept is not None:
                    factor = compounded(factor, grow(2 * n, kept.unit_roundoff))
                grown = self.grown[usual]
                share, moved = self._share(grown), grown @ size
                error = moved + np.abs(exact) * share + factor * (magnitude + moved) + underflow
                if off.any():
                    inherited = (self.p + grown) @ off
                    squares = np.square(self.p + grown) @ np.square(off)
                    cancelled = np.minimum(4 * np.sqrt(squares), inherited)
                    error = error + (cancelled if usual else inherited)
                error = how.own * error / np.where(share < 1, 1 - share, 0.0)
                # Sums that are normalised last hold up to n times as much.
                fits = (n * (magnitude + error) < (kept or sums).max) & ~self.unlimited
                fits &= np.isfinite(exact)
                for form in each:
                    fits &= ~(size >= form.max).any(axis=(-2, -1), keepdims=True)
                error = np.where(fits, error, np.inf)
                errors.append(np.where(np.asarray(empty) & np.isfinite(exact), 0.0, error))
        return Tracked(exact, errors[0], errors[1], how, sums)

    def _share(self, grown: Float64Array) -> Float64Array:
        """By how much the sum of the exponentials can be off, relative to itself; [..., S, 1]."""
        return grown.sum(axis=-1, keepdims=True) + self.how.lost * grown.shape[-1]
