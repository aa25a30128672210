"""Linear maps, and the one into queries, keys and values."""

from __future__ import annotations

import math
from typing import NamedTuple

from llama_layers.arrays.brief import brief
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import accumulate_format, check_sums_hold, dtype_of, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, ArrayT, Namespace
from llama_layers.layers.weights import QKVWeights


class QKV(NamedTuple):
    """Queries, keys and values of every token and head."""

    q: Array
    """Array [B, S, num_heads, head_dim]."""
    k: Array
    """Array [B, S, num_kv_heads, head_dim]."""
    v: Array
    """Array [B, S, num_kv_heads, head_dim]."""

    def __repr__(self) -> str:
        return brief(self)


def linear(x: ArrayT, weight: Array, bias: Array | None = None, /) -> ArrayT:
    r"""Multiply each row by a matrix, and add a bias.

    .. math:: y_o = \sum_i W_{oi} x_i + b_o

    Parameters
    ----------
    x : Array, shape [..., K], a float dtype
        Rows to multiply.
    weight : Array, shape [N, K], a float dtype
        The matrix as checkpoints store it, [out, in]. It may have a narrower dtype than the sums
        (bfloat16 for float32 `x`, for example), and is then widened exactly.
    bias : Array, shape [N], optional
        Added to each row of the product.

    Returns
    -------
    Array, shape [..., N], the dtype of x
        Sums are kept in float32 (float64 for float64 `x`). The backend chooses the memory order
        of the result.

    Raises
    ------
    TypeError
        If an argument is not an array of floats, comes from another library than `x`, or has a
        dtype that the sums cannot hold exactly.
    ValueError
        If the shapes do not fit or the devices differ.

    References
    ----------
    The bound on its error is `llama_layers.verify.linear_bound`.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import linear
    >>> linear(np.array([1.0, 2.0]), np.array([[1.0, 1.0], [0.0, 3.0], [5.0, 0.0]]))
    array([3., 6., 5.])
    """
    xp = namespace(x=x, weight=weight, bias=bias)
    check_sums_hold(x, weight=weight)
    if bias is not None:
        check_sums_hold(x, bias=bias)
    if x.ndim < 1:
        raise ValueError("x: expected shape [..., K], got a scalar")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape [N, {x.shape[-1]}] for x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
    rows = math.prod(x.shape[:-1])
    y = linear_2d(xp, xp.reshape(x, (rows, x.shape[-1])), weight, bias)
    return xp.reshape(y, (*x.shape[:-1], weight.shape[0]))


@portable
def linear_2d(xp: Namespace, x: ArrayT, weight: Array, bias: Array | None) -> ArrayT:
    """The definition of `linear`, for x [M, K] and arguments already checked."""
    wide = dtype_of(xp, accumulate_format(float_format("x", x)).name)
    widened = xp.astype(weight, wide, copy=False)  # exactly: bfloat16 to float32, for example
    y = xp.astype(x, wide, copy=False) @ widened.T
    if bias is not None:
        y = y + xp.astype(bias, wide, copy=False)
    return xp.astype(y, x.dtype, copy=False)


def qkv_projection(x: Array, w: QKVWeights, /) -> QKV:
    r"""Project hidden states to queries, keys and values, and split them into heads.

    .. math:: q = x W_q^\top + b_q, \quad k = x W_k^\top + b_k, \quad v = x W_v^\top + b_v

    Parameters
    ----------
    x : Array, shape [B, S, hidden_size], a float dtype
        Normalised hidden states.
    w : QKVWeights
        From the same library and device as `x`.

    Returns
    -------
    QKV
        ``q`` [B, S, num_heads, head_dim], ``k`` and ``v`` [B, S, num_kv_heads, head_dim], in the
        dtype of `x`: views of the one product, with each head's numbers where the checkpoint's
        rows put them.

    Raises
    ------
    TypeError
        If `x` is not an array of floats, or its library or dtype does not fit the weights.
    ValueError
        If `x` is not [B, S, hidden_size] or lies on another device than the weights.

    References
    ----------
    A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2.
    `arXiv:1706.03762 <https://arxiv.org/abs/1706.03762>`_. Grouped heads: J. Ainslie et al.,
    "GQA", EMNLP 2023. `arXiv:2305.13245 <https://arxiv.org/abs/2305.13245>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import QKVWeights, qkv_projection
    >>> rng = np.random.default_rng(0)
    >>> wq, wk, wv = rng.standard_normal((3, 64, 64), dtype=np.float32)
    >>> w = QKVWeights.from_separate(wq, wk, wv, num_heads=4, layout="in_out")
    >>> x = rng.standard_normal((1, 2, 64), dtype=np.float32)
    >>> q, k, v = qkv_projection(x, w)
    >>> q.shape
    (1, 2, 4, 16)
    """
    q, k, v = flat_qkv(x, w)
    return QKV(split_heads(q, w.head_dim), split_heads(k, w.head_dim), split_heads(v, w.head_dim))


def flat_qkv(x: Array, w: QKVWeights) -> tuple[Array, Array, Array]:
    """Queries, keys and values with their heads side by side: three views [B, S, heads * D]."""
    if not isinstance(w, QKVWeights):
        raise TypeError(f"w: expected QKVWeights, got {type(w).__name__}")
    namespace(x=x, w=w.fused)
    float_format("x", x)
    if x.ndim != 3 or x.shape[2] != w.hidden_size:
        raise ValueError(f"x: expected shape [batch, seq, {w.hidden_size}], got {list(x.shape)}")
    y = linear(x, w.fused, w.bias)
    end_of_q = w.num_heads * w.head_dim
    end_of_k = end_of_q + w.num_kv_heads * w.head_dim
    return y[:, :, :end_of_q], y[:, :, end_of_q:end_of_k], y[:, :, end_of_k:]


def split_heads(x: Array, head_dim: int) -> Array:
    """Reshape [B, S, heads * D] to [B, S, heads, D]."""
    batch, count, width = x.shape
    return namespace(x=x).reshape(x, (batch, count, width // head_dim, head_dim))


def merge_heads(x: Array) -> Array:
    """Reshape [B, S, heads, D] to [B, S, heads * D]."""
    batch, count, heads, head_dim = x.shape
    return namespace(x=x).reshape(x, (batch, count, heads * head_dim))
