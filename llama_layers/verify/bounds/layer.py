"""Bounds of all operations but those of attention."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.verify import operations
from llama_layers.verify.bound import Bound
from llama_layers.verify.profiles import Rounding


def embedding_bound(ids: Array, table: Array, /, **rounding: Any) -> Bound:
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
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import embedding_bound
    >>> table = np.ones((5, 4), np.float32)
    >>> bool(np.all(embedding_bound(np.array([[3, 1]]), table).limit == 0))
    True
    """
    namespace(ids=ids)
    return operations.Embedding(ids, table).bound(Rounding.of("table", table, **rounding))


def rms_norm_bound(
    x: Array, weight: Array | None, /, *, eps: float, offset: float = 0.0, **rounding: Any
) -> Bound:
    r"""Bound `llama_layers.rms_norm`.

    The mean square is a sum of positive numbers, so that its error is relative to itself,
    :math:`\gamma_{n+4}` in all, of which the root keeps about half. The root errs by `root_ulps`,
    and the two products by one rounding each. An `offset` adds one more, of its sum with the
    weight.

    Parameters
    ----------
    x : Array, shape [..., H]
        The input, as it was stored.
    weight : Array, shape [H], or None
        Scale of each channel; 1 if None.
    eps : float
        Added to the mean square, under the root.
    offset : float, optional
        Added to the weight: 1 for Gemma, 0 elsewhere.
    **rounding : object
        Keywords of `Rounding.of`.

    Returns
    -------
    Bound
        Of the shape of `x`.

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import rms_norm
    >>> from llama_layers.verify import rms_norm_bound
    >>> x, w = np.linspace(-1, 1, 64, dtype=np.float32), np.ones(64, np.float32)
    >>> bool(np.all(rms_norm_bound(x, w, eps=1e-5).ratio(rms_norm(x, w, eps=1e-5)) <= 1))
    True
    """
    namespace(weight=weight)
    if weight is None:
        weight, offset = np.ones(x.shape[-1:], np.float32), 0.0
    return operations.Norm(x, weight, eps, offset).bound(Rounding.of("x", x, **rounding))


def linear_bound(x: Array, weight: Array, bias: Array | None = None, /, **rounding: Any) -> Bound:
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
        Keywords of `Rounding.of`. With ``ranks=4, reduce="bfloat16"`` the sum is one of partial
        sums that four ranks add in bfloat16.

    Returns
    -------
    Bound
        Of shape [..., N].

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

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
    namespace(bias=bias)
    linear = operations.Linear(x, weight, bias, summed=True)
    return linear.bound(Rounding.of("x", x, **rounding))


def rope_bound(
    x: Array,
    positions: Array,
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
        Token positions; of the whole call, since "dynamic" and "longrope" scaling depend on the
        largest.
    config : LlamaConfig
        Its ``rope_theta``, ``rotary_dim`` and ``rope_scaling`` are read. Where RoPE differs from
        layer to layer: that of a layer, ``config.rope_of(layer)``.
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
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

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
    namespace(positions=positions)
    rope = operations.Rope(x, positions, config, layout)
    return rope.bound(Rounding.of("x", x, **rounding))


def swiglu_bound(gate: Array, up: Array, /, **rounding: Any) -> Bound:
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
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

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


def geglu_bound(gate: Array, up: Array, /, **rounding: Any) -> Bound:
    r"""Bound `llama_layers.geglu`.

    It holds for each form of gelu, with a tangent or with an exponential,

    .. math:: \frac{1 + \tanh z}{2} = \frac{1}{1 + e^{-2z}}, \quad
        z = \sqrt{2 / \pi} \, (g + 0.044715 g^3)

    An error of the tangent, at most :math:`2 u e` with e of `exp_ulps`, counts in full where the
    left side is small, so the bound has :math:`u e |g h|` for a gate g and an h of `up`.

    Parameters
    ----------
    gate, up : Array, any one shape
        The inputs, as they were stored.
    **rounding : object
        Keywords of `Rounding.of`; ``silu`` is the format of the gelu.

    Returns
    -------
    Bound
        Of the shape of `gate`. Nothing is said of infinite gates.

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import geglu
    >>> from llama_layers.verify import geglu_bound
    >>> gate, up = np.linspace(-9, 9, 64, dtype=np.float32), np.ones(64, np.float32)
    >>> bool(np.all(geglu_bound(gate, up).ratio(geglu(gate, up)) <= 1))
    True
    """
    return operations.Gate(gate, up, "gelu_pytorch_tanh").bound(
        Rounding.of("gate", gate, **rounding)
    )


def residual_bound(x: Array, added: Array, /, **rounding: Any) -> Bound:
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
    TypeError, ValueError
        If a dtype or a shape does not fit, or a keyword of `rounding` is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import residual_bound
    >>> a, b = np.float32([1, 2]), np.float32([1e-3, -2])
    >>> residual_bound(a, b).ratio(a + b) <= 1
    array([ True,  True])
    """
    return operations.Residual(x, added).bound(Rounding.of("x", x, **rounding))
