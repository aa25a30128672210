"""The gated MLP."""

from __future__ import annotations

import math
from collections.abc import Callable

from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import accumulate_format, dtype_of, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, ArrayT, Namespace
from llama_layers.errors import shown
from llama_layers.layers.group import reduce_partial
from llama_layers.layers.linear import linear
from llama_layers.layers.sites import sites_of_mlp
from llama_layers.layers.tap import Tap, checked
from llama_layers.layers.weights import MLPWeights


def swiglu(gate: ArrayT, up: Array, /) -> ArrayT:
    r"""Gate one array with another.

    .. math:: y = \operatorname{silu}(g) \, u, \quad \operatorname{silu}(g) = \frac{g}{1 + e^{-g}}

    Parameters
    ----------
    gate, up : Array, any one shape, a float dtype
        The gate, and what it scales.

    Returns
    -------
    Array, shape and dtype of gate
        Computed in float32 (float64 for float64) and rounded once; no gate overflows.

    Raises
    ------
    TypeError
        If an argument is not an array of floats, or library or dtype differ.
    ValueError
        If the shapes differ.

    References
    ----------
    N. Shazeer, "GLU Variants Improve Transformer", equation 6.
    `arXiv:2002.05202 <https://arxiv.org/abs/2002.05202>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import swiglu
    >>> swiglu(np.array([0.0, 1000.0, -1000.0]), np.array([5.0, 2.0, 2.0]))
    array([   0., 2000.,   -0.])
    """
    return gate_with_silu(_checked(gate, up), gate, up)


def _checked(gate: Array, up: Array) -> Namespace:
    """The library of two arrays that fit each other."""
    xp = namespace(gate=gate, up=up)
    form, found = float_format("gate", gate), float_format("up", up)
    if found is not form:
        raise TypeError(f"up: expected the dtype of gate, {form.name}, got {found.name}")
    if tuple(up.shape) != tuple(gate.shape):
        raise ValueError(f"up: expected shape {list(gate.shape)} of gate, got {list(up.shape)}")
    return xp


@portable
def gate_with_silu(xp: Namespace, gate: ArrayT, up: Array) -> ArrayT:
    """The definition of `swiglu`, for arguments already checked."""
    wide = dtype_of(xp, accumulate_format(float_format("gate", gate)).name)
    g = xp.astype(gate, wide, copy=False)
    # e^-|g| never overflows; for a negative gate 1 / (1 + e^-g) is e^g / (1 + e^g).
    decay = xp.exp(-xp.abs(g))
    sigmoid = xp.where(g >= 0, xp.ones_like(g), decay) / (1 + decay)
    y = g * sigmoid * xp.astype(up, wide, copy=False)
    return xp.astype(y, gate.dtype, copy=False)


def geglu(gate: ArrayT, up: Array, /) -> ArrayT:
    r"""Gate one array with the gelu of another, in its form with a hyperbolic tangent.

    .. math:: y = \operatorname{gelu}(g) \, u, \quad \operatorname{gelu}(g) = \frac{g}{2}
        \left( 1 + \tanh \left( \sqrt{2 / \pi} \, (g + 0.044715 g^3) \right) \right)

    Parameters
    ----------
    gate, up : Array, any one shape, a float dtype
        The gate, and what it scales.

    Returns
    -------
    Array, shape and dtype of gate
        Computed in float32 (float64 for float64) and rounded once.

    Raises
    ------
    TypeError
        If an argument is not an array of floats, or library or dtype differ.
    ValueError
        If the shapes differ.

    References
    ----------
    D. Hendrycks and K. Gimpel, "Gaussian Error Linear Units", section 2.
    `arXiv:1606.08415 <https://arxiv.org/abs/1606.08415>`_; N. Shazeer, "GLU Variants Improve
    Transformer", equation 6. `arXiv:2002.05202 <https://arxiv.org/abs/2002.05202>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import geglu
    >>> geglu(np.array([0.0, 10.0, -10.0]), np.array([5.0, 2.0, 2.0]))
    array([ 0., 20., -0.])
    """
    return gate_with_gelu(_checked(gate, up), gate, up)


@portable
def gate_with_gelu(xp: Namespace, gate: ArrayT, up: Array) -> ArrayT:
    """The definition of `geglu`, for arguments already checked."""
    wide = dtype_of(xp, accumulate_format(float_format("gate", gate)).name)
    g = xp.astype(gate, wide, copy=False)
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * (g * g * g))
    y = g * (0.5 * (1 + xp.tanh(inner))) * xp.astype(up, wide, copy=False)
    return xp.astype(y, gate.dtype, copy=False)


GATES: dict[str, Callable[[Array, Array], Array]] = {"silu": swiglu, "gelu_pytorch_tanh": geglu}
"""By the ``hidden_act`` of a config."""


def mlp(x: ArrayT, w: MLPWeights, /, *, hidden_act: str = "silu", tap: Tap | None = None) -> ArrayT:
    r"""Project up twice, gate, and project down.

    .. math:: y = W_d \left( \operatorname{act}(W_g x) \odot W_u x \right)

    Parameters
    ----------
    x : Array, shape [..., hidden_size], a float dtype
        Normalised hidden states.
    w : MLPWeights
        From the same library and device as `x`.
    hidden_act : {"silu", "gelu_pytorch_tanh"}, optional
        The function act: silu, or gelu with a hyperbolic tangent.
    tap : callable or mapping of str to callable, optional
        ``tap(name, array) -> array``, called at ``gate_proj``, ``up_proj``, ``act`` (the gated
        product) and ``down_proj``; the array that it returns, of the same shape and dtype, is used
        instead. A mapping calls its functions only at the sites that their keys name.

    Returns
    -------
    Array, shape and dtype of x
        The MLP's term of the residual stream.

    Raises
    ------
    TypeError
        If `w` is not MLPWeights, or `tap` cannot be called and is not a mapping.
    ValueError
        If `hidden_act` is neither.
    TypeError, ValueError
        As `linear`, or if `tap` returns an array of another shape or dtype, or a key of it names
        no site.

    References
    ----------
    N. Shazeer, "GLU Variants Improve Transformer", equation 6.
    `arXiv:2002.05202 <https://arxiv.org/abs/2002.05202>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import MLPWeights, mlp
    >>> w = MLPWeights(np.ones((6, 4)), np.ones((6, 4)), np.ones((4, 6)))
    >>> mlp(np.zeros((1, 2, 4)), w).shape
    (1, 2, 4)
    """
    if not isinstance(w, MLPWeights):
        raise TypeError(f"w: expected MLPWeights, got {type(w).__name__}")
    if hidden_act not in GATES:
        raise ValueError(f"hidden_act: expected one of {', '.join(GATES)}, got {shown(hidden_act)}")
    tap = checked(tap, sites_of_mlp)
    gate = tap("gate_proj", linear(x, w.gate_proj, w.gate_bias))
    up = tap("up_proj", linear(x, w.up_proj, w.up_bias))
    gated = tap("act", GATES[hidden_act](gate, up))
    y = linear(gated, w.down_proj, w.down_bias)
    return tap("down_proj", reduce_partial(y, w.group))
