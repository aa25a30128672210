"""Scaled dot-product attention with grouped heads."""

from __future__ import annotations

import math

from llama_layers.arrays.checks import check_finite
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import (
    accumulate_format,
    check_bools,
    check_sums_hold,
    dtype_name,
    dtype_of,
    float_format,
)
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, ArrayT, Namespace, Number
from llama_layers.layers.mask import Mask, mask_rows
from llama_layers.layers.scaling import soft_capped
from llama_layers.layers.tap import TapFunction

# Scores held at a time, over all heads and batches: 64 MiB in float32.
SCORES = 1 << 24


def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    /,
    *,
    mask: Mask | Array | None = None,
    scale: Number | None = None,
    softcap: Number | None = None,
    sinks: Array | None = None,
) -> ArrayT:
    r"""Average the values of the keys that a query may attend to, weighted by softmax.

    .. math:: y_s = \sum_t p_{st} v_t, \quad
        p_{st} = \frac{e^{a_{st} - m_s}}{\sum_{t'} e^{a_{st'} - m_s}}, \quad
        a_{st} = c \, q_s \cdot k_t, \quad m_s = \max_t a_{st}

    over the keys t that the mask allows; a query that may attend to none gets zeros. Query head h
    reads key and value head ``h // (num_heads / num_kv_heads)``.

    Parameters
    ----------
    q : Array, shape [B, S, num_heads, D], a float dtype
        Queries, after RoPE.
    k : Array, shape [B, T, num_kv_heads, D], the dtype of q
        Keys, after RoPE.
    v : Array, shape [B, T, num_kv_heads, D], the dtype of q
        Values.
    mask : Array of bool, shape [S, T], [1, S, T] or [B, S, T], or Mask, optional
        True where a query may attend to a key; every key for every query if not given.
    scale : float, optional
        The c above; ``1 / sqrt(D)`` if not given.
    softcap : float, optional
        Scores a become ``softcap * tanh(a / softcap)``, as in Gemma 2.
    sinks : Array, shape [num_heads], optional
        A number for each query head that joins its scores in the softmax, as that of one more key,
        which every query may attend to and whose value is zero.

    Returns
    -------
    Array, shape [B, S, num_heads, D], the dtype of q
        All arithmetic is in float32 (float64 for float64 `q`), rounded once. Scores exist for a
        block of queries at a time, so that memory grows linearly with the sequence.

    Raises
    ------
    TypeError
        If an argument is not an array of floats, the mask is not boolean, library or dtype differ,
        or `scale` or `softcap` is not a number.
    ValueError
        If the shapes do not fit, `scale` is not finite, or `softcap` is not finite and positive.

    Notes
    -----
    A value that is NaN or Inf may reach any query, even if the mask hides its key, because 0
    times NaN is NaN: hidden values must be finite.

    Products of queries and keys beyond 3.4e38 overflow float32 (float64 beyond 1.8e308), before
    they are scaled. If the score of any key that a query may attend to becomes plus infinity or
    NaN, the query gets NaN. A key whose score is minus infinity has weight zero. If all scores are
    minus infinity, the query gets NaN without a mask, and zeros with one.

    References
    ----------
    A. Vaswani et al., "Attention Is All You Need", equation 1.
    `arXiv:1706.03762 <https://arxiv.org/abs/1706.03762>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import attention
    >>> q, k = np.zeros((1, 1, 1, 2)), np.zeros((1, 3, 1, 2))
    >>> v = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 8.0]]).reshape(1, 3, 1, 2)
    >>> attention(q, k, v)
    array([[[[2., 4.]]]])
    """
    xp = namespace(q=q, k=k, v=v)
    _check(xp, q, k, v, mask, sinks)
    if scale is None:
        scale = 1 / math.sqrt(max(1, q.shape[3]))
    scale = check_finite("scale", scale)
    cap = checked_softcap(softcap)
    if cap is None and sinks is None:
        return attend(xp, q, k, v, mask, scale)
    return attend_in_blocks(xp, q, k, v, mask, scale, cap, sinks)


def _check(
    xp: Namespace,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | Array | None,
    sinks: Array | None,
) -> None:
    form = float_format("q", q)
    if q.ndim != 4:
        raise ValueError(f"q: expected shape [B, S, num_heads, D], got {list(q.shape)}")
    batch, queries, heads, width = q.shape
    for name, array in (("k", k), ("v", v)):
        if float_format(name, array) is not form:
            raise TypeError(
                f"{name}: expected the dtype of q, {form.name}, got {dtype_name(array.dtype)}"
            )
        if array.ndim != 4 or array.shape[0] != batch or array.shape[3] != width:
            raise ValueError(
                f"{name}: expected shape [{batch}, T, num_kv_heads, {width}], "
                f"got {list(array.shape)}"
            )
    if tuple(v.shape) != tuple(k.shape):
        raise ValueError(f"v: expected shape {list(k.shape)} of k, got {list(v.shape)}")
    if not k.shape[2] or heads % k.shape[2]:
        raise ValueError(f"k: expected heads in a divisor of q's {heads}, got {k.shape[2]}")
    if sinks is not None:
        namespace(q=q, sinks=sinks)
        check_sums_hold(q, sinks=sinks)
        check_sinks(sinks, heads)
    if isinstance(mask, Mask):
        mask.check(q, k.shape[1])
    elif mask is not None:
        namespace(q=q, mask=mask)
        check_bools("mask", mask)
        expected = (queries, k.shape[1])
        if tuple(mask.shape) not in (expected, (1, *expected), (batch, *expected)):
            raise ValueError(
                f"mask: expected shape {list(expected)} or {[batch, *expected]}, "
                f"got {list(mask.shape)}"
            )


def check_sinks(sinks: Array, heads: int) -> None:
    """Raise ValueError unless there is a sink for each head."""
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks: expected shape [{heads}], got {list(sinks.shape)}")


def checked_softcap(softcap: Number | None) -> float | None:
    """The cap of scores, if there is one; it is positive."""
    if softcap is None:
        return None
    cap = check_finite("softcap", softcap)
    if cap <= 0:
        raise ValueError(f"softcap: expected a positive number, got {cap!r}")
    return cap


@portable
def attend(
    xp: Namespace, q: ArrayT, k: Array, v: Array, mask: Mask | Array | None, scale: float
) -> ArrayT:
    """The definition of `attention` without cap and sinks, for arguments already checked."""
    return attend_in_blocks(xp, q, k, v, mask, scale, None, None)


def attend_in_blocks(
    xp: Namespace,
    q: ArrayT,
    k: Array,
    v: Array,
    mask: Mask | Array | None,
    scale: float,
    softcap: float | None,
    sinks: Array | None,
) -> ArrayT:
    """Attend some queries at a time."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    if not math.prod(q.shape) or not keys:
        return xp.zeros_like(q)
    # The queries of a group become rows of one matrix, for the one key head that they share.
    grouped, kt, values = _by_key_head(xp, q, k, v)
    step = max(1, SCORES // (batch * heads * keys))
    blocks = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        scores = _products(xp, grouped[:, :, :, start:stop, :], kt) * scale
        if softcap is not None:
            scores = soft_capped(scores, softcap)
        weights, totals = _weights(xp, scores, _allowed(xp, mask, start, stop), sinks)
        y = _products(xp, weights, values) / totals
        blocks.append(_by_query(xp, y, q))
    return blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=1)


def tapped_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    /,
    *,
    mask: Mask | Array | None,
    scale: float,
    softcap: float | None,
    sinks: Array | None,
    tap: TapFunction,
) -> ArrayT:
    """Attend with all scores at once, so that a tap can see and replace what they become.

    The tap gets ``scores`` [B, num_heads, S, T], scaled, capped and before the mask, and then
    ``probabilities`` of the same shape, both in the format of sums.
    """
    xp = namespace(q=q, k=k, v=v)
    _check(xp, q, k, v, mask, sinks)
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    by_head = (batch, heads, queries, keys)
    by_key_head = (batch, kv_heads, heads // kv_heads, queries, keys)
    grouped, kt, values = _by_key_head(xp, q, k, v)
    scores = _products(xp, grouped, kt) * scale
    if softcap is not None:
        scores = soft_capped(scores, softcap)
    scores = tap("scores", xp.reshape(scores, by_head))
    probabilities = scores
    if math.prod(by_head):
        scores = xp.reshape(scores, by_key_head)
        weights, totals = _weights(xp, scores, _allowed(xp, mask, 0, queries), sinks)
        probabilities = xp.reshape(weights / totals, by_head)
    probabilities = tap("probabilities", probabilities)
    return _by_query(xp, _products(xp, xp.reshape(probabilities, by_key_head), values), q)


def _by_key_head(xp: Namespace, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Queries [B, kv_heads, group, S, D], keys [B, kv_heads, D, T], values [B, kv_heads, T, D].

    They are in the format of sums.
    """
    wide = dtype_of(xp, accumulate_format(float_format("q", q)).name)
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = xp.reshape(
        xp.astype(q, wide, copy=False), (batch, queries, kv_heads, heads // kv_heads, width)
    )
    return (
        xp.permute_dims(grouped, (0, 2, 3, 1, 4)),
        xp.permute_dims(xp.astype(k, wide, copy=False), (0, 2, 3, 1)),
        xp.permute_dims(xp.astype(v, wide, copy=False), (0, 2, 1, 3)),
    )


def _by_query(xp: Namespace, y: Array, q: ArrayT) -> ArrayT:
    """Heads [B, kv_heads, group, S, D] as [B, S, num_heads, D], in the dtype of q."""
    batch, kv_heads, group, queries, width = y.shape
    y = xp.astype(xp.permute_dims(y, (0, 3, 1, 2, 4)), q.dtype, copy=False)
    return xp.reshape(y, (batch, queries, kv_heads * group, width))


def _products(xp: Namespace, rows: Array, matrices: Array) -> Array:
    """Products of rows [B, kv_heads, group, S, N] and a matrix [B, kv_heads, N, M] of each head."""
    *heads, group, count, width = rows.shape
    flat = xp.reshape(rows, (*heads, group * count, width)) @ matrices
    return xp.reshape(flat, (*heads, group, count, matrices.shape[-1]))


def _allowed(xp: Namespace, mask: Mask | Array | None, start: int, stop: int) -> Array | None:
    """The mask of some queries, broadcastable against their scores."""
    rows = mask_rows(xp, mask, start, stop)
    return None if rows is None else xp.reshape(rows, (rows.shape[0], 1, 1, *rows.shape[1:]))


def _weights(
    xp: Namespace, scores: Array, allowed: Array | None, sinks: Array | None
) -> tuple[Array, Array]:
    """The exponentials of scores, as `shifted_exp` gives them, and their sums with the sinks'."""
    if sinks is None:
        weights = shifted_exp(xp, scores, allowed)
        return weights, _totals(xp, weights)
    batch, kv_heads, group, queries, _ = scores.shape
    column = xp.reshape(xp.astype(sinks, scores.dtype), (1, kv_heads, group, 1, 1))
    column = xp.broadcast_to(column, (batch, kv_heads, group, queries, 1))
    if allowed is not None:
        allowed = xp.concat([allowed, xp.ones_like(allowed[..., :1])], axis=-1)
    weights = shifted_exp(xp, xp.concat([scores, column], axis=-1), allowed)
    return weights[..., :-1], _totals(xp, weights)


def _totals(xp: Namespace, weights: Array) -> Array:
    """The sums of weights over keys; 1 for a query that attends to none."""
    total = xp.sum(weights, axis=-1, keepdims=True)
    return xp.where(total == 0, xp.ones_like(total), total)


def shifted_exp(xp: Namespace, scores: Array, allowed: Array | None) -> Array:
    """The exponentials of scores minus the largest of their row; 0 where a key is not allowed."""
    if allowed is None:
        return xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    scores = xp.where(allowed, scores, -math.inf)
    largest = xp.max(scores, axis=-1, keepdims=True)
    largest = xp.where(largest == -math.inf, xp.zeros_like(largest), largest)  # an empty row
    return xp.exp(scores - largest)
