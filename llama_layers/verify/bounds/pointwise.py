"""Rounding of what is computed element by element: embeddings, gates and residuals."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    beyond,
    bounded,
    compounded,
    finite_magnitude,
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
)


def embedding_bound(ids: Any, table: Any, /, *, dtype: str | None = None) -> Bound:
    """The rows of a table, and what rounding into the result's format allows.

    Nothing, unless that format does not hold the table's numbers; then one rounding,
    :math:`u_o |y|`, and what underflows.

    Parameters
    ----------
    ids : Array, an integer dtype
        Which rows.
    table : Array, shape [N, H]
        The rows.
    dtype : str, optional
        The format of the result; that of `table` if not given.

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
    stored = float_format("table", table)
    narrow = narrowing(known_format("dtype", dtype), stored)
    rows, chosen = to_numpy(table), to_numpy(ids)
    if rows.ndim != 2:
        raise ValueError(f"table: expected shape [N, H], got {list(rows.shape)}")
    if not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(f"ids: expected an integer dtype, got {chosen.dtype}")
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(rows)):
        raise ValueError(
            f"ids: expected numbers from 0 to {len(rows) - 1}, got {chosen.min()} to {chosen.max()}"
        )
    exact = rows[chosen].astype(np.float64)
    error = rounded(np.zeros_like(exact), exact, narrow)
    overflows = beyond(exact, error, narrow)
    return bounded(exact, (error, error), unlimited=overflows, certain=exact == 0)


def swiglu_bound(
    gate: Any,
    up: Any,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    sigmoid: str | None = None,
    silu: str | None = None,
    exp_ulps: float = 4.0,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The exact `llama_layers.swiglu` and the bound on its error.

    With :math:`y = g \, \sigma(g) \, h` for gate g and up h, and exponentials that err by a
    relative :math:`2 u e` (e is `exp_ulps`), the sigmoid errs by :math:`1 / (1 - 2 u e)` at most,
    whichever sign its exponential has, and sum, division and two products add four roundings:

    .. math:: |\hat y - y| \le r |y| + u e |g h| (1 + r) + \eta, \quad
        r = \frac{1 + \gamma_4}{1 - 2 u e} - 1

    and :math:`(1 + u_o)` times that and :math:`u_o |y|` more where the result is rounded. The
    second term is for :math:`\sigma(g) = (1 + \tanh(g / 2)) / 2`, where an error of the hyperbolic
    tangent counts in full though the sigmoid is small.

    An engine that rounds each step of :math:`\sigma(g) = 1 / (1 + e^{-g})` to a format with unit
    roundoff :math:`u_s` (`sigmoid`) has the factor

    .. math:: \frac{1 + u_s}{(1 - u_s) (1 - w)}, \quad
        w = \frac{u_s (1 + 2 u e)}{1 - 2 u e} \, \sigma(-g),

    more in :math:`1 + r`: of the quotient, of the sum, and of the exponential, which counts for
    as much as it is of the sum. Where the sum may overflow that format, silu may be zero.

    Where the engine computed from other inputs than were stored, within :math:`\delta_g` and
    :math:`\delta_h` (`inputs`), silu is off by

    .. math:: \Delta = \max_{|t| \le \delta_g} |s(g + t) - s(g)|, \quad s(g) = g \, \sigma(g),

    which is at an end of that interval: s falls or rises through all of it, or is convex, around
    its least value at -1.28. The product is off by another
    :math:`\Delta (|h| + \delta_h) + |s| \delta_h`, and in the terms above :math:`|s| + \Delta`,
    :math:`|g| + \delta_g` and :math:`|h| + \delta_h` are the sizes of silu, gate and up.

    Parameters
    ----------
    gate, up : Array, any one shape
        The operation's inputs, as they were stored.
    dtype : str, optional
        The format of the result; that of `gate` if not given.
    accumulate : str, optional
        The format of the arithmetic; float32, or float64 for float64 `gate`, if not given.
    sigmoid : str, optional
        The format that the exponential, the sum and the quotient of the sigmoid are each rounded
        to.
    silu : str, optional
        The format that silu(gate) is rounded to before it multiplies.
    exp_ulps : float, optional
        What is assumed of the engine: the error of its exponentials and hyperbolic tangents, in
        units in the last place.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that gate and up were rounded to where they were stored, though the engine
        computed from what they were before, in the format of the sums. Nothing is if it has all
        digits of that.

    Returns
    -------
    Bound
        Of the shape of `gate`. ``usual`` is the limit: so few roundings need not cancel. Nothing
        is said of infinite gates.

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
    out, sums = formats("gate", gate, dtype, accumulate)
    float_format("up", up)
    between = narrowing(known_format("silu", silu), sums)
    step = narrowing(known_format("sigmoid", sigmoid), sums)
    g, h = float64(gate), float64(up)
    if g.shape != h.shape:
        raise ValueError(f"up: expected shape {list(g.shape)} of gate, got {list(h.shape)}")
    u, lost = sums.unit_roundoff, lost_to_underflow(sums, flushes)
    before = narrowing(known_format("inputs", inputs), sums)
    off_g, off_h = input_error(g, before), input_error(h, before)
    exp_error = 2 * u * exp_ulps
    relative: Any = np.inf
    if exp_error < 1:
        relative = compounded(gamma(4, u), exp_error / (1 - exp_error))
    with np.errstate(all="ignore"):
        gated = _silu(g)
        exact = gated * h
        moved = _silu_moved(g, off_g)
        size_g, size_h = finite_magnitude(g) + off_g, finite_magnitude(h) + off_h
        if step is not None:
            steps = _steps(g - off_g, exp_error, step)
            relative = relative + steps + relative * steps
        error = relative * (finite_magnitude(gated) + moved)
        error = error + u * exp_ulps * size_g * (1 + relative)
        error = own_error(sums) * error + lost * (1 + size_g) + moved
        if step is not None:
            error = error + step.smallest_subnormal * size_g
            vanishes = (1 + np.exp(off_g - g)) * (1 + relative) >= step.max
            error = np.where(vanishes, error + finite_magnitude(gated), error)
        overflows = beyond(gated, error, between) | beyond(gated, error, sums)
        error = rounded(error, gated, between) * size_h + finite_magnitude(gated) * off_h
        # The product, and the gated one in another order, may underflow; so may `up`.
        error = error + lost * (1 + size_g + size_h)
        overflows |= beyond(exact, error, sums)
        error = rounded(error, exact, narrowing(out, sums))
        overflows |= beyond(exact, error, out) | overflowed(exact, g, h) | np.isinf(g)
        overflows |= np.isinf(off_h)
    zero = (size_g == 0) & (g == 0) | (size_h == 0) & (h == 0)
    return bounded(exact, (error, error), unlimited=overflows, certain=zero)


def _silu(x: Float64Array) -> Float64Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _steps(g: Float64Array, exp_error: float, to: FloatFormat) -> Float64Array:
    """The relative error of sigmoids of g or more by roundings of their steps.

    Exponentials are off by so much before. One that underflows is off by no more of the sum, which
    is 1 or more, than the smallest number.
    """
    u = to.unit_roundoff
    off = u * (1 + exp_error) / (1 - exp_error) / (1 + np.exp(g)) + to.smallest_subnormal
    factor = (1 + u) / ((1 - u) * (1 - off))
    return np.where(off < 1, factor, np.inf) - 1


def _silu_moved(x: Float64Array, off: Float64Array) -> Float64Array:
    """How far silu can be from that of x, so far from x at most."""
    at = _silu(x)
    below, above = (finite_magnitude(_silu(end) - at) for end in (x - off, x + off))
    return np.maximum(below, above)


def residual_bound(
    a: Any,
    b: Any,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The sum of two arrays, and the bound on its error.

    .. math:: |\hat y - y| \le u |y| (1 + u_o) + u_o |y|

    Sums do not underflow (Higham, section 2.1 and problem 2.19), so nothing is allowed where they
    are zero. An engine that flushes may lose both inputs and the result, each below the smallest
    normal number. Where the engine computed from other inputs than were stored, within
    :math:`\delta` in all (`inputs`), the sum is off by that, and its rounding error one of
    :math:`|y| + \delta`:

    .. math:: |\hat y - y| \le (u (|y| + \delta) + \delta) (1 + u_o) + u_o |y|

    Parameters
    ----------
    a, b : Array, any one shape
        The operation's inputs, as they were stored.
    dtype : str, optional
        The format of the result; that of `a` if not given.
    accumulate : str, optional
        The format of the sum; float32, or float64 for float64 `a`, if not given.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that `a` and `b` were rounded to where they were stored, though the engine
        computed from what they were before, in the format of the sums. Nothing is if it has all
        digits of that.

    Returns
    -------
    Bound
        Of the shape of `a`. ``usual`` is the limit.

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
    out, sums = formats("a", a, dtype, accumulate)
    float_format("b", b)
    a64, b64 = float64(a), float64(b)
    if a64.shape != b64.shape:
        raise ValueError(f"b: expected shape {list(a64.shape)} of a, got {list(b64.shape)}")
    before = narrowing(known_format("inputs", inputs), sums)
    off = input_error(a64, before) + input_error(b64, before)
    with np.errstate(invalid="ignore", over="ignore"):
        exact = a64 + b64
        error = own_error(sums) * sums.unit_roundoff * (finite_magnitude(exact) + off) + off
        if flushes:
            error = error + 3 * sums.smallest_normal
        overflows = beyond(exact, error, sums)
        error = rounded(error, exact, narrowing(out, sums))
        overflows |= beyond(exact, error, out) | overflowed(exact, a64, b64)
        overflows |= np.isinf(off)
    certain = (exact == 0) & (off == 0)
    return bounded(exact, (error, error), unlimited=overflows, certain=certain)
