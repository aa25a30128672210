"""Rounding of attention's probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    bounded,
    compounded,
    formats,
    gamma,
    input_error,
    known_format,
    lost_to_underflow,
    narrowing,
    own_error,
    rounded,
    usual_growth,
)
from llama_layers.verify.bounds.scores import (
    Errors,
    ScoreRounding,
    check_heads,
    score_rounding,
    tile_of,
    tiles,
)


@dataclass(frozen=True)
class MaskRows:
    """A mask that allows, or one that is added, some rows at a time."""

    array: Any | None

    @classmethod
    def of(cls, mask: Any | None, batch: int, queries: int, keys: int) -> MaskRows:
        """The mask, if its shape and dtype are right."""
        if mask is None:
            return cls(None)
        array = to_numpy(mask)
        if array.dtype != bool:
            float_format("mask", mask)
        expected = (queries, keys)
        if array.shape not in (expected, (1, *expected), (batch, *expected)):
            raise ValueError(
                f"mask: expected shape {list(expected)} or {[batch, *expected]}, "
                f"got {list(array.shape)}"
            )
        return cls(np.broadcast_to(array, (batch, *expected)))

    def allowed(self, batch: int, rows: slice) -> Any | None:
        """Which keys may be seen, [S, T]; None for all."""
        if self.array is None or self.array.dtype != bool:
            return None
        return self.array[batch, rows]

    def added(self, errors: Errors, how: ScoreRounding, batch: int, rows: slice) -> Errors:
        """The scores with the mask added, if it is one to add."""
        if self.array is None or self.array.dtype == bool:
            return errors
        with np.errstate(all="ignore"):
            exact = errors.exact + self.array[batch, rows].astype(np.float64)
            last = how.between or how.sums
            most, usual = (
                np.where(exact == -np.inf, 0.0, rounded(error, exact, last))
                for error in (errors.largest, errors.usual)
            )
        return Errors(exact, most, usual)


@dataclass(frozen=True)
class Weights:
    """Probabilities, and what errors of their exponentials make of them."""

    p: Float64Array
    grown: tuple[Float64Array, Float64Array]
    """By how much each grows if its exponential errs by most, and usually, and no other does."""
    unlimited: Any
    """Rows of which nothing can be said, [..., S, 1]."""
    hidden: Any
    """Rows that may see no key, [S, 1]."""

    def share(self, which: int, underflow: float) -> Float64Array:
        """By how much the sum of the exponentials can be off, relative to itself; [..., S, 1]."""
        grown = self.grown[which]
        share: Float64Array = grown.sum(axis=-1, keepdims=True) + underflow * grown.shape[-1]
        return share


def weigh(
    scores: Errors,
    allowed: Any | None,
    sums: FloatFormat,
    exp_ulps: float,
    rescalings: int = 0,
) -> Weights:
    """The softmax of the scores of a tile, [..., S, T], over the keys that are allowed."""
    u = sums.unit_roundoff
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
        grown = []
        unlimited = ~np.isfinite(total)
        for error, grow in ((scores.largest, gamma), (scores.usual, usual_growth)):
            error = np.where(visible, error, 0.0)
            most = error.max(axis=-1, keepdims=True, initial=0.0)
            delta = error * (1 + u) + u * (distance + 2 * most)
            steps = math.ceil(2 * exp_ulps + 1) * rescalings
            exponential = compounded(2 * u * exp_ulps, grow(steps, u))
            growth = e * np.expm1(np.minimum(delta, 1.0))
            if (far := delta > 1).any():
                growth[far] = np.exp(above[far] + delta[far]) - e[far]
            # Errors beyond all bounds stay usual where only few bits are to blame, not an overflow.
            overflows = ~np.isfinite(most)
            grown.append((growth * (1 + exponential) + e * exponential) / np.maximum(total, 1.0))
        unlimited |= overflows
        # Without a key but minus infinity an engine divides 0 by 0, unless the mask says so.
        hidden = False if allowed is None else ~allowed.any(axis=-1, keepdims=True)
        unlimited |= ~visible.any(axis=-1, keepdims=True) & ~np.asarray(hidden)
        p = e / np.where(total == 0, 1.0, total)
    return Weights(p, (grown[0], grown[1]), unlimited, hidden)


def probability_errors(
    weights: Weights, which: int, sums: FloatFormat, out: FloatFormat | None, flushes: bool
) -> Float64Array:
    """The errors of normalised weights."""
    n, u, lost = weights.p.shape[-1], sums.unit_roundoff, lost_to_underflow(sums, flushes)
    p, grown, share = weights.p, weights.grown[which], weights.share(which, lost)
    with np.errstate(all="ignore"):
        normalising = compounded(quotient((gamma, usual_growth)[which](n, u)), u, u)
        error = grown + p * share + normalising * (p + grown)
        error = own_error(sums) * error / np.where(share < 1, 1 - share, 0.0) + 2 * lost
        return np.where(weights.unlimited, np.inf, rounded(error, p, out))


def quotient(gamma: float) -> float:
    """The relative error of the inverse of what errs by gamma."""
    return gamma / (1 - gamma) if gamma < 1 else math.inf


def softmax_bound(
    scores: Any,
    /,
    *,
    mask: Any | None = None,
    dtype: str | None = None,
    accumulate: str | None = None,
    exp_ulps: float = 4.0,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The softmax over the keys that a mask allows, and the bound on its error.

    With :math:`p_t = e^{a_t - m} / \sum_{t'} e^{a_{t'} - m}` and m the largest score, the
    subtraction errs by :math:`u |a_t - m|` and the exponential by a relative :math:`2 u e` (e is
    `exp_ulps`), so that each numerator errs by a relative

    .. math:: \eta_t = e^{u |a_t - m|} (1 + 2 u e) - 1,

    and the sum of the n numerators, all positive, by :math:`r = \sum_t p_t \eta_t` from these and
    by :math:`\gamma_n` from summing; a division, or a product with the inverse, is within 2
    roundings:

    .. math:: |\hat p_t - p_t| \le
        \frac{p_t \eta_t + p_t r + \kappa p_t (1 + \eta_t)}{1 - r} + \eta,
        \quad \kappa = \frac{(1 + u)^2}{1 - \gamma_n} - 1

    and :math:`u_o p_t` where the result is rounded. Where the engine computed from other scores
    than were stored, within :math:`\delta_t` (`inputs`), these are errors of the scores, as
    :math:`\alpha_t` in `probabilities_bound`. P. Blanchard, D. Higham and N. Higham bound the
    same algorithm in one format ("Accurately computing the log-sum-exp and softmax functions", IMA
    Journal of Numerical Analysis 41, 2021).

    Parameters
    ----------
    scores : Array, shape [B, heads, S, T]
        As they were stored.
    mask : Array, shape [S, T], [1, S, T] or [B, S, T], optional
        Of bool: True where a query may attend to a key; a query that may attend to none gets
        exact zeros. Of floats: added to the scores.
    dtype : str, optional
        The format of the result; that of `scores` if not given.
    accumulate : str, optional
        The format of the arithmetic; float32, or float64 for float64 `scores`, if not given.
    exp_ulps : float, optional
        What is assumed of the engine: the error of its exponentials, in units in the last place.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that scores were rounded to where they were stored, though the engine computed
        from what they were before, in the format of the sums. Nothing is if it has all digits of
        that.

    Returns
    -------
    Bound
        Of the shape of `scores`. ``usual`` has :math:`4 \sqrt n u` in the place of
        :math:`\gamma_n`. Nothing is said of rows with NaN or infinity, or with minus infinity
        only.

    Raises
    ------
    TypeError
        If an argument holds no floats.
    ValueError
        If a shape does not fit or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import softmax_bound
    >>> scores = np.linspace(-3, 3, 6, dtype=np.float32).reshape(1, 1, 2, 3)
    >>> e = np.exp(scores)
    >>> bool(np.all(softmax_bound(scores).ratio(e / e.sum(axis=-1, keepdims=True)) <= 1))
    True
    """
    out, sums = formats("scores", scores, dtype, accumulate)
    values = to_numpy(scores)
    if values.ndim != 4:
        raise ValueError(f"scores: expected shape [B, heads, S, T], got {list(values.shape)}")
    batch, heads, queries, keys = values.shape
    masks = MaskRows.of(mask, batch, queries, keys)
    # A mask is added to the scores in the format of the sums.
    how = ScoreRounding(1.0, sums, None, None, flushes, None)
    before = narrowing(known_format("inputs", inputs), sums)
    exact, limit, usual = (np.zeros(values.shape) for _ in range(3))
    for tile in tiles(batch, queries, keys, heads, heads):
        place = (tile.batch, tile.heads, tile.rows)
        a = values[place].astype(np.float64)
        off = input_error(a, before)
        given = masks.added(Errors(a, off, off), how, tile.batch, tile.rows)
        allowed = masks.allowed(tile.batch, tile.rows)
        weights = weigh(given, allowed, sums, exp_ulps)
        _fill((exact, limit, usual), place, weights, allowed, (out, sums), flushes)
    return Bound(exact, limit, usual)


def _fill(
    arrays: tuple[Float64Array, Float64Array, Float64Array],
    place: tuple[int, slice, slice],
    weights: Weights,
    allowed: Any | None,
    formats: tuple[FloatFormat, FloatFormat],
    flushes: bool,
) -> None:
    """Put the bound of a tile where it belongs."""
    out, sums = formats
    largest, usual = (
        probability_errors(weights, i, sums, narrowing(out, sums), flushes) for i in range(2)
    )
    hidden = False if allowed is None else ~allowed & ~weights.unlimited
    bound = bounded(weights.p, (largest, usual), certain=hidden)
    for array, part in zip(arrays, (bound.exact, bound.limit, bound.usual), strict=True):
        array[place] = part


def probabilities_bound(
    q: Any,
    k: Any,
    /,
    *,
    mask: Any | None = None,
    scale: float,
    dtype: str | None = None,
    accumulate: str | None = None,
    scores: str | None = None,
    operands: str | None = None,
    exp_ulps: float = 4.0,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The probabilities of attention from queries and keys, and the bound on their error.

    As `softmax_bound`, of scores that err by :math:`\alpha_t`, the limit of `scores_bound` without
    a result's rounding, so that

    .. math:: \eta_t = e^{\alpha_t + u (|a_t - m| + \alpha_t + 2 \max \alpha)} (1 + 2 u e) - 1

    Parameters
    ----------
    q : Array, shape [B, S, heads, D]
        Queries after RoPE, as they were stored.
    k : Array, shape [B, T, kv_heads, D]
        Keys after RoPE, as they were stored.
    mask : Array, shape [S, T], [1, S, T] or [B, S, T], optional
        As `softmax_bound` takes it.
    scale : float
        What products of queries and keys are multiplied by.
    dtype : str, optional
        The format of the result; that of `q` if not given.
    accumulate : str, optional
        The format of the arithmetic; float32, or float64 for float64 `q`, if not given.
    scores : str, optional
        A format that the products are rounded to, before and after they are scaled.
    operands : str, optional
        A format that queries and keys are rounded to first.
    exp_ulps : float, optional
        What is assumed of the engine: the error of its exponentials, in units in the last place.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that queries and keys were rounded to, as for `scores_bound`.

    Returns
    -------
    Bound
        Of shape [B, heads, S, T].

    Raises
    ------
    TypeError
        If an argument holds no floats, or the scale is not a number.
    ValueError
        If a shape does not fit, a format is unknown or the scale is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import probabilities_bound
    >>> q = k = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 2, 1, 16)
    >>> causal = np.tri(2, dtype=bool)
    >>> probabilities_bound(q, k, mask=causal, scale=0.25).limit[0, 0, 0, 1]
    np.float64(0.0)
    """
    out, sums = formats("q", q, dtype, accumulate)
    how = score_rounding(q, k, scale, sums, scores, operands, flushes, inputs)
    q64, k64 = to_numpy(q), to_numpy(k)
    check_heads(q64, k=k64)
    (batch, queries, heads, _), keys, kv_heads = q64.shape, k64.shape[1], k64.shape[2]
    masks = MaskRows.of(mask, batch, queries, keys)
    exact, limit, usual = (np.zeros((batch, heads, queries, keys)) for _ in range(3))
    for tile in tiles(batch, queries, keys, heads, kv_heads):
        errors = how.errors(*tile_of(tile, q64, k64))
        allowed = masks.allowed(tile.batch, tile.rows)
        weights = weigh(masks.added(errors, how, tile.batch, tile.rows), allowed, sums, exp_ulps)
        place = (tile.batch, tile.heads, tile.rows)
        _fill((exact, limit, usual), place, weights, allowed, (out, sums), flushes)
    return Bound(exact, limit, usual)
