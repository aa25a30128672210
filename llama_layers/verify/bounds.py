"""The exact result of each operation, and the bound on the error of a computed one.

One function for each operation, for arrays at hand. All take the formats and roundings that are
stated of the engine as keywords: those of `Rounding.of`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.verify import operations
from llama_layers.verify.bound import Bound
from llama_layers.verify.profiles import Rounding

__all__ = [
    "Bound",
    "attention_bound",
    "embedding_bound",
    "linear_bound",
    "probabilities_bound",
    "residual_bound",
    "rms_norm_bound",
    "rope_bound",
    "scores_bound",
    "softmax_bound",
    "swiglu_bound",
    "weighted_sum_bound",
]


def embedding_bound(ids: Any, table: Any, /, **rounding: Any) -> Bound:
    """Bound rows of a table, which are copied, and rounded if the result's format is narrower.

    Parameters
    ----------
    ids : Array, an integer dtype
        The rows to copy.
    table : Array, shape [N, H]
        The rows.
    **rounding : object
        Keywords of `Rounding.of`; the format is that of `table` if no `dtype` is given.

    Returns
    -------
    Bound
        Of shape [..., H].

    Raises
    ------
    TypeError
        If the table holds no floats, or the ids are not integers.
    ValueError
        If a shape does not fit, an id is out of range or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import embedding_bound
    >>> table = np.ones((5, 4), np.float32)
    >>> bool(np.all(embedding_bound(np.array([[3, 1]]), table).limit == 0))
    True
    """
    return operations.Embedding(ids, table).bound(Rounding.of("table", table, **rounding))


def rms_norm_bound(x: Any, weight: Any, /, *, eps: float, **rounding: Any) -> Bound:
    r"""Bound `llama_layers.rms_norm`.

    The mean square is a sum of positive numbers, so that its error is relative to itself,
    :math:`\gamma_{n+4}` in all, of which the root keeps about half. The root errs by `root_ulps`,
    and the two products by one rounding each.

    Parameters
    ----------
    x : Array, shape [..., H]
        The input, as it was stored.
    weight : Array, shape [H]
        Scale of each channel.
    eps : float
        Added to the mean square, under the root.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of the shape of `x`.

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
    return operations.Norm(x, weight, eps).bound(Rounding.of("x", x, **rounding))


def linear_bound(x: Any, weight: Any, bias: Any | None = None, /, **rounding: Any) -> Bound:
    r"""Bound `llama_layers.linear`.

    With n products an element, :math:`A = |x| |W|^\top + |b|` and :math:`u_o` the unit roundoff of
    the result's format,

    .. math:: |\hat y - y| \le \gamma_n A (1 + u_o) + u_o |y| + \eta

    where :math:`\eta` is what products that underflow can lose. The terms with :math:`u_o` fall
    away where the result's format is that of the sums.

    Parameters
    ----------
    x : Array, shape [..., K]
        The input, as it was stored: no bound can know of an earlier rounding.
    weight : Array, shape [N, K]
        The matrix.
    bias : Array, shape [N], optional
        Added to each row.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of shape [..., N].

    Raises
    ------
    TypeError
        If an argument holds no floats.
    ValueError
        If a shape does not fit or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import linear
    >>> from llama_layers.verify import linear_bound
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.standard_normal((3, 64), np.float32), rng.standard_normal((8, 64), np.float32)
    >>> bool(np.all(linear_bound(x, w).ratio(linear(x, w)) <= 1))
    True
    """
    return operations.Linear(x, weight, bias).bound(Rounding.of("x", x, **rounding))


def rope_bound(
    x: Any,
    positions: Any,
    config: LlamaConfig,
    /,
    *,
    layout: Literal["half", "interleaved"] = "half",
    **rounding: Any,
) -> Bound:
    """Bound the rotation of `llama_layers.apply_rope`.

    At position 0 nothing is rotated, and nothing allowed but the rounding into the result's format.

    Parameters
    ----------
    x : Array, shape [B, S, heads, D]
        Queries or keys, as they were stored.
    positions : Array, shape [S] or [B, S], an integer dtype
        Token positions; of the whole call, since "dynamic" scaling depends on the largest.
    config : LlamaConfig
        Its ``rope_theta``, ``head_dim`` and ``rope_scaling`` are read.
    layout : {"half", "interleaved"}
        The channels that are a pair; see `llama_layers.apply_rope`.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of the shape of `x`.

    Raises
    ------
    TypeError
        If `x` holds no floats or `positions` no integers.
    ValueError
        If a shape does not fit, or a layout or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import LlamaConfig, apply_rope, rope_table
    >>> from llama_layers.verify import rope_bound
    >>> config, places = LlamaConfig.llama2_7b(), np.arange(3)
    >>> x = np.linspace(-1, 1, 384, dtype=np.float32).reshape(1, 3, 1, 128)
    >>> y = apply_rope(x, *rope_table(places, config, like=x))
    >>> bool(np.all(rope_bound(x, places, config).ratio(y) <= 1))
    True
    """
    rope = operations.Rope(x, positions, config, layout)
    return rope.bound(Rounding.of("x", x, **rounding))


def scores_bound(q: Any, k: Any, /, *, scale: float, **rounding: Any) -> Bound:
    """Bound the scores of attention, scaled products of queries and keys.

    Parameters
    ----------
    q : Array, shape [B, S, heads, D]
        Queries after RoPE, as they were stored.
    k : Array, shape [B, T, kv_heads, D]
        Keys after RoPE, as they were stored; query head h reads key head
        ``h // (heads / kv_heads)``.
    scale : float
        The factor of the products.
    **rounding : object
        Keywords of `Rounding.of`.

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
    >>> from llama_layers.verify import scores_bound
    >>> q = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 2, 2, 16)
    >>> k = q[:, :, :1]
    >>> computed = np.einsum("bshd,btzd->bhst", q, k) * np.float32(0.25)
    >>> bool(np.all(scores_bound(q, k, scale=0.25).ratio(computed) <= 1))
    True
    """
    return operations.Scores(q, k, None, scale).bound(Rounding.of("q", q, **rounding))


def softmax_bound(scores: Any, /, *, mask: Any | None = None, **rounding: Any) -> Bound:
    """Bound the softmax over the keys that a mask allows.

    Parameters
    ----------
    scores : Array, shape [B, heads, S, T]
        As they were stored.
    mask : Array, shape [S, T], [1, S, T] or [B, S, T], optional
        Of bool: True where a query may attend to a key; a query that may attend to none gets
        exact zeros. Of floats: added to the scores.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of the shape of `scores`. Nothing is said of rows with NaN or infinity, or with minus
        infinity only.

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
    return operations.Softmax(scores, mask).bound(Rounding.of("scores", scores, **rounding))


def probabilities_bound(
    q: Any, k: Any, /, *, mask: Any | None = None, scale: float, **rounding: Any
) -> Bound:
    """Bound the probabilities of attention, from queries and keys.

    Parameters
    ----------
    q, k : Array
        As `scores_bound` takes them.
    mask : Array, optional
        As `softmax_bound` takes it.
    scale : float
        The factor of the products of queries and keys.
    **rounding : object
        Keywords of `Rounding.of`.

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
    both = operations.Probabilities(q, k, mask, scale)
    return both.bound(Rounding.of("q", q, **rounding))


def weighted_sum_bound(probabilities: Any, v: Any, /, **rounding: Any) -> Bound:
    """Bound the values weighed by probabilities.

    Parameters
    ----------
    probabilities : Array, shape [B, heads, S, T]
        As they were stored.
    v : Array, shape [B, T, kv_heads, D]
        Values, as they were stored.
    **rounding : object
        Keywords of `Rounding.of`; the format is that of `v` if no `dtype` is given.

    Returns
    -------
    Bound
        Of shape [B, S, heads, D]. Nothing is said of sums with NaN or infinity, since an engine may
        leave out keys that weigh nothing.

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
    sums = operations.WeightedSum(probabilities, v)
    return sums.bound(Rounding.of("v", v, **rounding))


def attention_bound(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    mask: Any | None = None,
    scale: float | None = None,
    **rounding: Any,
) -> Bound:
    """Bound `llama_layers.attention` as a whole.

    It holds for scores, softmax and weighted sum one after the other, and for online softmax, which
    rescales what it has summed when a block of keys has a larger score.

    Parameters
    ----------
    q, k : Array
        As `scores_bound` takes them.
    v : Array, the shape of k
        Values, as they were stored.
    mask : Array, optional
        As `softmax_bound` takes it.
    scale : float, optional
        The factor of the products of queries and keys; 1 / sqrt(D) if not given.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of shape [B, S, heads, D]. Nothing is said of results with NaN or infinity.

    Raises
    ------
    TypeError
        If an argument holds no floats, or the scale is not a number.
    ValueError
        If a shape does not fit, a format is unknown, the scale is not finite or the block is not a
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
    how = Rounding.of("q", q, **rounding)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return operations.Attention(q, k, v, mask, scale).bound(how)


def swiglu_bound(gate: Any, up: Any, /, **rounding: Any) -> Bound:
    """Bound `llama_layers.swiglu`.

    Parameters
    ----------
    gate, up : Array, any one shape
        The inputs, as they were stored.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of the shape of `gate`. Nothing is said of infinite gates.

    Raises
    ------
    TypeError
        If an argument holds no floats.
    ValueError
        If the shapes differ or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import swiglu
    >>> from llama_layers.verify import swiglu_bound
    >>> gate, up = np.linspace(-9, 9, 64, dtype=np.float32), np.ones(64, np.float32)
    >>> bool(np.all(swiglu_bound(gate, up).ratio(swiglu(gate, up)) <= 1))
    True
    """
    return operations.Gate(gate, up).bound(Rounding.of("gate", gate, **rounding))


def residual_bound(x: Any, added: Any, /, **rounding: Any) -> Bound:
    """Bound the sum of two arrays.

    Parameters
    ----------
    x, added : Array, any one shape
        The inputs, as they were stored.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of the shape of `x`.

    Raises
    ------
    TypeError
        If an argument holds no floats.
    ValueError
        If the shapes differ or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import residual_bound
    >>> a, b = np.float32([1, 2]), np.float32([1e-3, -2])
    >>> residual_bound(a, b).ratio(a + b) <= 1
    array([ True,  True])
    """
    return operations.Residual(x, added).bound(Rounding.of("x", x, **rounding))
