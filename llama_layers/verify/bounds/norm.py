"""Rounding of RMSNorm."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import float_format
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    beyond,
    bounded,
    carried,
    float64,
    formats,
    gamma,
    input_error,
    known_format,
    lost_to_underflow,
    narrowing,
    overflowed,
    own_error,
    rounded,
    usual_growth,
)


def rms_norm_bound(
    x: Any,
    weight: Any,
    /,
    *,
    eps: float,
    dtype: str | None = None,
    accumulate: str | None = None,
    normed: str | None = None,
    root_ulps: float = 1.0,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The exact `llama_layers.rms_norm` and the bound on its error.

    The mean square is a sum of positive terms, so its error is relative to itself: n roundings in
    the sum of squares, at most two in the division by n, one in eps and one in adding it make
    :math:`\gamma_{n+4}`, of which the root keeps about half. The root and the quotient by it err
    by one unit in the last place of the sums' format (`root_ulps`), the two products by one
    rounding each:

    .. math:: |\hat y - y| \le \left( \frac{(1 + 2 u r)(1 + u)^2}{\sqrt{1 - \gamma_{n+4}}}
        (1 + u_n) - 1 \right) |y| (1 + u_o) + u_o |y| + \eta

    with :math:`u_n` the roundoff of the format of the normalised row, if it has one of its own.

    Where the engine computed from other inputs than were stored, :math:`|x - \tilde x| \le \delta`
    (`inputs`), their mean square and eps, :math:`s = \sum x_i^2 / n + \epsilon`, are off by a
    relative

    .. math:: \zeta = \frac{\sum_i \delta_i (2 |x_i| + \delta_i)}{n s},

    which is added to :math:`\gamma_{n+4}`, and the element itself by
    :math:`\delta_i |w_i| / \sqrt s`, which is added to :math:`|y|` and once to the whole. At first
    order in the inputs' roundoff that is :math:`2 u_i |y|`.

    Parameters
    ----------
    x : Array, shape [..., H]
        The operation's input, as it was stored.
    weight : Array, shape [H]
        Scale of each channel.
    eps : float
        Under the root.
    dtype : str, optional
        The format of the result; that of `x` if not given.
    accumulate : str, optional
        The format of the arithmetic; float32, or float64 for float64 `x`, if not given.
    normed : str, optional
        A format that the normalised row is rounded to before it multiplies with the weight, as
        transformers, Meta's code and gpt-fast do.
    root_ulps : float, optional
        What is assumed of the engine: the error of its reciprocal root, in units in the last
        place. A root and a division that are each rounded correctly are within 1.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that `x` was rounded to where it was stored, though the engine computed from
        what it was before, in the format of the sums. Nothing is if it has all digits of that.

    Returns
    -------
    Bound
        Of the shape of `x`. ``usual`` has :math:`4 \sqrt n u` in the place of :math:`\gamma_n`,
        and :math:`4 \sqrt{\sum}` of the squares in the place of the sum in :math:`\zeta`.

    Raises
    ------
    TypeError
        If an argument holds no floats.
    ValueError
        If a shape does not fit or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import rms_norm
    >>> from llama_layers.verify import rms_norm_bound
    >>> x, w = np.linspace(-1, 1, 64, dtype=np.float32), np.ones(64, np.float32)
    >>> bool(np.all(rms_norm_bound(x, w, eps=1e-5).ratio(rms_norm(x, w, eps=1e-5)) <= 1))
    True
    """
    out, sums = formats("x", x, dtype, accumulate)
    float_format("weight", weight)
    x64, w64 = float64(x), float64(weight)
    if x64.ndim < 1 or w64.shape != (x64.shape[-1],):
        raise ValueError(
            f"weight: expected shape [H] for x [..., H], got {list(w64.shape)} "
            f"for x {list(x64.shape)}"
        )
    between = narrowing(known_format("normed", normed), sums)
    n, u = x64.shape[-1], sums.unit_roundoff
    lost = lost_to_underflow(sums, flushes)
    off = input_error(x64, narrowing(known_format("inputs", inputs), sums))
    with np.errstate(all="ignore"):
        reversed64 = x64[..., ::-1]  # as in `linear_bound`, another order than is judged
        mean_square = np.mean(reversed64 * reversed64, axis=-1, keepdims=True)
        row = x64 / np.sqrt(mean_square + eps)
        exact = row * w64
        moved = off * np.abs(w64) / np.sqrt(mean_square + eps)
        squares = carried((off * (2 * np.abs(x64) + off), np.ones((n, 1))))
        underflow = lost * (2 + np.abs(w64)) + np.zeros_like(row)
        if between is not None:
            underflow += between.smallest_subnormal * np.abs(w64)
        if flushes:  # x and the weight may be taken for zero before anything is computed
            underflow += lost * (np.abs(w64) / np.sqrt(mean_square + eps) + np.abs(row))
        lost_squares = 2 * lost / (mean_square + eps)

        def error(growth: float, square: Any) -> Float64Array:
            mean_error = own_error(sums) * growth + lost_squares + square / n / (mean_square + eps)
            root = -0.5 * np.log1p(-np.minimum(mean_error, 1))
            roundings = np.log1p(2 * u * root_ulps) + 2 * np.log1p(u)
            if between is not None:
                roundings += np.log1p(between.unit_roundoff)
            relative = own_error(sums) * np.expm1(roundings + root)
            total = relative * (np.abs(exact) + moved) + moved + underflow
            return np.asarray(rounded(total, exact, narrowing(out, sums)))

        limit = error(gamma(n + 4, u), squares[0])
        usual = error(usual_growth(n + 4, u), squares[1])
        sum_of_squares = (n * mean_square + squares[0]) * (1 + gamma(n, u))
        can_overflow = ~(sum_of_squares < sums.max) & np.isfinite(mean_square)
        can_overflow = can_overflow | beyond(exact, limit, out) | beyond(row, 0.0, between)
        can_overflow |= overflowed(exact, row, w64)
        # Squares that all underflow leave a root of zero, and rows of Inf and NaN.
        lost_squares = lost_squares + squares[0] / n / (mean_square + eps)
        can_overflow |= np.isfinite(exact) & (gamma(n + 4, u) + lost_squares >= 1)
        can_overflow |= np.isinf(off).any(axis=-1, keepdims=True)
    zero = (((x64 == 0) & (off == 0)) | (w64 == 0)) & ~can_overflow
    return bounded(exact, (limit, usual), unlimited=can_overflow, certain=zero)
