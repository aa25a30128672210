"""Rounding of attention's weighted sums, and of attention as a whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llama_layers.arrays.checks import check_count
from llama_layers.arrays.dtypes import FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    beyond,
    bounded,
    carried,
    compounded,
    finite_magnitude,
    formats,
    gamma,
    input_error,
    known_format,
    lost_to_underflow,
    narrowing,
    own_error,
    read_in,
    rounded,
    usual_growth,
)
from llama_layers.verify.bounds.scores import check_heads, score_rounding, tile_of, tiles
from llama_layers.verify.bounds.softmax import MaskRows, Weights, quotient, weigh


def weighted_sum_bound(
    probabilities: Any,
    v: Any,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    operands: str | None = None,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The values weighed by probabilities, and the bound on the error.

    A product of matrices, as in `linear_bound`: with T keys,

    .. math:: |\hat y - y| \le \gamma_T |p| |v| (1 + u_o) + u_o |y| + \eta

    Where the engine computed from other inputs than were stored, within :math:`\delta_p` and
    :math:`\delta_v` (`inputs`), the product is off by
    :math:`\Delta = \delta_p |v| + (|p| + \delta_p) \delta_v`, and its rounding errors are of
    :math:`|p| |v| + \Delta`.

    Parameters
    ----------
    probabilities : Array, shape [B, heads, S, T]
        As they were stored.
    v : Array, shape [B, T, kv_heads, D]
        Values, as they were stored.
    dtype : str, optional
        The format of the result; that of `v` if not given.
    accumulate : str, optional
        The format that sums are kept in; float32, or float64 for float64 `v`, if not given.
    operands : str, optional
        A format that probabilities and values are rounded to first, so that the exact sums are
        those of what they become.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that probabilities and values were rounded to where they were stored, though the
        engine computed from what they were before, in the format of the sums. Nothing is if it has
        all digits of that.

    Returns
    -------
    Bound
        Of shape [B, S, heads, D]. ``usual`` has :math:`4 \sqrt T u` in the place of
        :math:`\gamma_T`, and :math:`4 \sqrt{\sum}` of the squares in the place of the sums in
        :math:`\Delta`. Nothing is said of sums with NaN or infinity, since an engine may leave
        out keys that weigh nothing.

    Raises
    ------
    TypeError
        If an argument holds no floats.
    ValueError
        If a shape does not fit or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import weighted_sum_bound
    >>> p, v = np.full((1, 1, 1, 2), 0.5, np.float32), np.ones((1, 2, 1, 4), np.float32)
    >>> weighted_sum_bound(p, v).exact
    array([[[[1., 1., 1., 1.]]]])
    """
    out, sums = formats("v", v, dtype, accumulate)
    stored, stored_p = float_format("v", v), float_format("probabilities", probabilities)
    form = known_format("operands", operands)
    p, values = to_numpy(probabilities), to_numpy(v)
    if p.ndim != 4:
        raise ValueError(f"probabilities: expected shape [B, heads, S, T], got {list(p.shape)}")
    batch, heads, queries, keys = p.shape
    fits = values.ndim == 4 and values.shape[:2] == (batch, keys)
    if not fits or not values.shape[2] or heads % values.shape[2]:
        raise ValueError(
            f"v: expected shape [{batch}, {keys}, kv_heads, D], kv_heads a divisor of {heads}, "
            f"got {list(values.shape)}"
        )
    read, read_p = narrowing(form, stored), narrowing(form, stored_p)
    before = narrowing(known_format("inputs", inputs), sums)
    shape = (batch, queries, heads, values.shape[3])
    exact, limit, usual = (np.zeros(shape) for _ in range(3))
    for tile in tiles(batch, queries, keys, heads, values.shape[2]):
        weights = read_in(p[tile.batch, tile.heads, tile.rows].astype(np.float64), read_p)
        numbers = read_in(values[tile.batch, :, tile.kv].astype(np.float64), read)
        parts = _sums(weights, numbers, out, sums, flushes, before)
        for array, part in zip((exact, limit, usual), parts, strict=True):
            array[tile.batch, tile.rows, tile.heads] = part.transpose(1, 0, 2)
    return Bound(exact, limit, usual)


def _sums(
    p: Float64Array,
    v: Float64Array,
    out: FloatFormat,
    sums: FloatFormat,
    flushes: bool,
    before: FloatFormat | None,
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """The weighted sums of a tile, their limit and their usual error."""
    n, u = len(v), sums.unit_roundoff
    off_p, off_v = input_error(p, before), input_error(v, before)
    size_p, size_v = finite_magnitude(p) + off_p, finite_magnitude(v) + off_v
    with np.errstate(all="ignore"):
        exact = np.ascontiguousarray(p[..., ::-1]) @ np.ascontiguousarray(v[::-1])
        magnitude = size_p @ size_v
        size = size_p.sum(axis=-1, keepdims=True) + size_v.sum(axis=0)
        underflow = n * sums.smallest_subnormal + np.zeros_like(size)
        if flushes:
            underflow = sums.smallest_normal * (size + 2 * n)
        moved = carried((off_p, finite_magnitude(v)), (size_p, off_v))
        errors = []
        for grow, off in zip((gamma, usual_growth), moved, strict=True):
            error = own_error(sums) * grow(n, u) * magnitude + underflow + off
            overflows = ~(magnitude + error < sums.max)
            error = rounded(error, exact, narrowing(out, sums))
            errors.append(np.where(overflows | beyond(exact, error, out), np.inf, error))
    zero = (magnitude == 0) & (sums.name != "float64")
    bound = bounded(exact, (errors[0], errors[1]), unlimited=~np.isfinite(exact), certain=zero)
    return bound.exact, bound.limit, bound.usual


def attention_bound(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    mask: Any | None = None,
    scale: float | None = None,
    dtype: str | None = None,
    accumulate: str | None = None,
    scores: str | None = None,
    probabilities: str | None = None,
    operands: str | None = None,
    weighted_sums: str | None = None,
    exp_ulps: float = 4.0,
    block: int = 16,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The exact `llama_layers.attention` and the bound on its error.

    It holds for scores, softmax and weighted sum one after the other, and for online softmax (T.
    Dao et al., "FlashAttention", `arXiv:2205.14135 <https://arxiv.org/abs/2205.14135>`_), which
    rescales what it has summed when a block of keys has a larger score.

    With scores that err by :math:`\alpha_t` (the limit of `scores_bound` without the result's
    rounding), the exponential of key t errs by a relative

    .. math:: \eta_t = e^{\Delta_t} (1 + 2 u e)(1 + \rho) - 1, \quad
        \Delta_t = \alpha_t + u (|a_t - m| + \alpha_t + 2 \max \alpha),

    where e is `exp_ulps` and :math:`\rho` the error of the exponentials that rescale, one for each
    block. (Online, the arguments of all exponentials that a key meets add up to
    :math:`a_t - m`.) An error of the largest score, which all keys share, cancels. For exact sums
    of inexact exponentials

    .. math:: \tilde y - y = \frac{\sum_t p_t \varepsilon_t (v_t - y)}{1 + \sum_t p_t \varepsilon_t}
        , \quad |\tilde y - y| \le \frac{\sum_t p_t \eta_t |v_t| + |y| r}{1 - r},
        \quad r = \sum_t p_t \eta_t.

    Both sums have T terms that are rescaled N times, for N blocks; the quotient (or the product
    with the inverse) takes 2 roundings more, and where probabilities are rounded to a format of
    roundoff :math:`u_p`, before they are normalised or after, one of those:

    .. math:: |\hat y - \tilde y| \le \Gamma \, \frac{\sum_t p_t (1 + \eta_t) |v_t|}{1 - r},
        \quad \Gamma = \frac{1 + \gamma_{T + N}}{1 - \gamma_{T + N}} (1 + u)^2 (1 + u_p) - 1

    Where the engine computed from other inputs than were stored, within :math:`\delta` of them
    (`inputs`), the scores' :math:`\alpha_t` tells what comes of queries and keys. Errors of values
    are weighed as the values are, and add :math:`\sum_t p_t (1 + \eta_t) \delta_t / (1 - r)`; in
    the other terms the values are :math:`|v_t| + \delta_t`.

    Parameters
    ----------
    q : Array, shape [B, S, heads, D]
        Queries after RoPE, as they were stored.
    k : Array, shape [B, T, kv_heads, D]
        Keys after RoPE, as they were stored.
    v : Array, the shape of k
        Values, as they were stored.
    mask : Array, shape [S, T], [1, S, T] or [B, S, T], optional
        Of bool: True where a query may attend to a key; a query that may attend to none gets
        exact zeros. Of floats: added to the scores.
    scale : float, optional
        What products of queries and keys are multiplied by; :math:`1 / \sqrt D` if not given.
    dtype : str, optional
        The format of the result; that of `q` if not given.
    accumulate : str, optional
        The format of the arithmetic; float32, or float64 for float64 `q`, if not given.
    scores : str, optional
        A format that the products are rounded to, before and after they are scaled.
    probabilities : str, optional
        A format that the probabilities are rounded to, before or after they are normalised.
    operands : str, optional
        A format that queries, keys, values and probabilities are rounded to before they multiply:
        the exact attention is that of what the first three become, and the probabilities may err
        by a rounding.
    weighted_sums : str, optional
        A format that the sums of weighted values are kept in, two roundings for each key: one where
        it is added, one where what was summed is rescaled.
    exp_ulps : float, optional
        What is assumed of the engine: the error of its exponentials, in units in the last place.
    block : int, optional
        What is assumed of the engine: it rescales no more than once in so many keys.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that queries, keys and values were rounded to where they were stored, though the
        engine computed from what they were before, in the format of the sums. Nothing is if it has
        all digits of that.

    Returns
    -------
    Bound
        Of shape [B, S, heads, D]. ``usual`` has :math:`4 \sqrt n u` in the place of each
        :math:`\gamma_n`, in :math:`\alpha` and :math:`\rho` too. The limit is infinite where
        :math:`r \ge 1`. Nothing is said of results with NaN or infinity.

    Raises
    ------
    TypeError
        If an argument holds no floats, or the scale is not a number.
    ValueError
        If a shape does not fit, a format is unknown, the scale is not finite or the block is no
        positive number.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import attention
    >>> from llama_layers.verify import attention_bound
    >>> q = k = v = np.linspace(-1, 1, 96, dtype=np.float32).reshape(1, 3, 2, 16)
    >>> bool(np.all(attention_bound(q, k, v).ratio(attention(q, k, v)) <= 1))
    True
    """
    out, sums = formats("q", q, dtype, accumulate)
    q64, k64, v64 = to_numpy(q), to_numpy(k), to_numpy(v)
    check_heads(q64, k=k64, v=v64)
    if k64.shape != v64.shape:
        raise ValueError(f"v: expected shape {list(k64.shape)} of k, got {list(v64.shape)}")
    check_count("block", block)
    (batch, queries, heads, width), keys, kv_heads = q64.shape, k64.shape[1], k64.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    how = score_rounding(q, k, scale, sums, scores, operands, flushes, inputs)
    form = known_format("operands", operands)
    factors = [
        narrowing(known_format("probabilities", probabilities), sums),
        narrowing(form, sums),
    ]
    read = narrowing(form, float_format("v", v))
    kept = narrowing(known_format("weighted_sums", weighted_sums), sums)
    masks = MaskRows.of(mask, batch, queries, keys)
    blocks = -(-keys // block)
    exact, limit, usual = (np.zeros(q64.shape) for _ in range(3))
    for tile in tiles(batch, queries, keys, heads, kv_heads):
        errors = how.errors(*tile_of(tile, q64, k64))
        errors = masks.added(errors, how, tile.batch, tile.rows)
        allowed = masks.allowed(tile.batch, tile.rows)
        weights = weigh(errors, allowed, sums, exp_ulps, blocks)
        numbers = read_in(v64[tile.batch, :, tile.kv].astype(np.float64), read)
        off = input_error(numbers, how.before)
        parts = _weighed(weights, (numbers, off), out, sums, factors, kept, blocks, flushes)
        for array, part in zip((exact, limit, usual), parts, strict=True):
            array[tile.batch, tile.rows, tile.heads] = part.transpose(1, 0, 2)
    return Bound(exact, limit, usual)


def _weighed(
    weights: Weights,
    values: tuple[Float64Array, Float64Array],
    out: FloatFormat,
    sums: FloatFormat,
    factors: list[FloatFormat | None],
    kept: FloatFormat | None,
    blocks: int,
    flushes: bool,
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Attention of a tile, of values that are off by so much, its limit and its usual error."""
    v, off = values
    n, u, lost = len(v), sums.unit_roundoff, lost_to_underflow(sums, flushes)
    size_v = finite_magnitude(v) + off
    each = [form for form in factors if form is not None]
    with np.errstate(all="ignore"):
        reverse = np.ascontiguousarray(weights.p[..., ::-1])
        exact = reverse @ np.ascontiguousarray(v[::-1])
        magnitude = weights.p @ size_v
        total = size_v.sum(axis=0)
        # Exponentials, products and quotients can all underflow, and lose so much at most.
        underflow = 4 * lost * (total + n * (np.abs(exact) + 1))
        for form in each:
            underflow += 2 * form.smallest_subnormal * (total + 1)
        if kept is not None:
            underflow += 2 * n * kept.smallest_subnormal
        errors = []
        for i, grow in enumerate((gamma, usual_growth)):
            growth = grow(n + blocks, u)
            factor = compounded(growth, quotient(growth), u, u, *(f.unit_roundoff for f in each))
            if kept is not None:
                factor = compounded(factor, grow(2 * n, kept.unit_roundoff))
            share = weights.share(i, lost)
            moved = weights.grown[i] @ size_v
            error = moved + np.abs(exact) * share + factor * (magnitude + moved) + underflow
            error = error + carried((weights.p + weights.grown[i], off))[i]
            error = own_error(sums) * error / np.where(share < 1, 1 - share, 0.0)
            # Sums that are normalised last hold up to n times as much.
            most = (kept or sums).max
            overflows = ~(n * (magnitude + error) < most) | weights.unlimited
            for form in each:
                overflows |= bool((size_v >= form.max).any())
            error = rounded(error, exact, narrowing(out, sums))
            errors.append(np.where(overflows | beyond(exact, error, out), np.inf, error))
    unlimited = ~np.isfinite(exact)
    bound = bounded(exact, (errors[0], errors[1]), unlimited=unlimited, certain=weights.hidden)
    return bound.exact, bound.limit, bound.usual
