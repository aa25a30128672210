"""Bounds of attention and of its parts."""

from __future__ import annotations

import math
from typing import Any

from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array
from llama_layers.verify import operations
from llama_layers.verify.bound import Bound
from llama_layers.verify.profiles import Rounding


def scores_bound(
    q: Array, k: Array, /, *, scale: float, softcap: float | None = None, **rounding: Any
) -> Bound:
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
    softcap : float, optional
        As `llama_layers.attention` takes it.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of shape [B, heads, S, T].

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

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
    scores = operations.Scores(q, k, None, scale, softcap)
    return scores.bound(Rounding.of("q", q, **rounding))


def softmax_bound(
    scores: Array, /, *, mask: Array | None = None, sinks: Array | None = None, **rounding: Any
) -> Bound:
    """Bound the softmax over the keys that a mask allows.

    Parameters
    ----------
    scores : Array, shape [B, heads, S, T]
        As they were stored.
    mask : Array, shape [S, T], [1, S, T] or [B, S, T], optional
        Of bool: True where a query may attend to a key; a query that may attend to none gets
        exact zeros. Of floats: added to the scores.
    sinks : Array, shape [heads], optional
        As `llama_layers.attention` takes them.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of the shape of `scores`. Nothing is said of rows with NaN or infinity, or with minus
        infinity only.

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import softmax_bound
    >>> scores = np.linspace(-3, 3, 6, dtype=np.float32).reshape(1, 1, 2, 3)
    >>> e = np.exp(scores)
    >>> bool(np.all(softmax_bound(scores).ratio(e / e.sum(axis=-1, keepdims=True)) <= 1))
    True
    """
    namespace(mask=mask, sinks=sinks)
    softmax = operations.Softmax(scores, mask, sinks)
    return softmax.bound(Rounding.of("scores", scores, **rounding))


def probabilities_bound(
    q: Array,
    k: Array,
    /,
    *,
    mask: Array | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Array | None = None,
    **rounding: Any,
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
    softcap : float, optional
        As `llama_layers.attention` takes it.
    sinks : Array, shape [heads], optional
        As `llama_layers.attention` takes them.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of shape [B, heads, S, T].

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import probabilities_bound
    >>> q = k = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 2, 1, 16)
    >>> causal = np.tri(2, dtype=bool)
    >>> probabilities_bound(q, k, mask=causal, scale=0.25).limit[0, 0, 0, 1]
    np.float64(0.0)
    """
    namespace(mask=mask, sinks=sinks)
    both = operations.Probabilities(q, k, mask, scale, softcap, sinks)
    return both.bound(Rounding.of("q", q, **rounding))


def weighted_sum_bound(probabilities: Array, v: Array, /, **rounding: Any) -> Bound:
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
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

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
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    mask: Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
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
    softcap : float, optional
        As `llama_layers.attention` takes it.
    sinks : Array, shape [heads], optional
        As `llama_layers.attention` takes them.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of shape [B, S, heads, D]. Nothing is said of results with NaN or infinity.

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import attention
    >>> from llama_layers.verify import attention_bound
    >>> q = k = v = np.linspace(-1, 1, 96, dtype=np.float32).reshape(1, 3, 2, 16)
    >>> bool(np.all(attention_bound(q, k, v).ratio(attention(q, k, v)) <= 1))
    True
    """
    namespace(mask=mask, sinks=sinks)
    how = Rounding.of("q", q, **rounding)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return operations.Attention(q, k, v, mask, scale, softcap, sinks).bound(how)
