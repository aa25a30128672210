"""Rounding of linear maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    carried,
    finite_magnitude,
    float64,
    formats,
    gamma,
    input_error,
    known_format,
    narrowing,
    usual_growth,
)

# Rows of a weight that are held in float64 at a time.
BLOCK_ROWS = 1024


def linear_bound(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The exact `llama_layers.linear` and the bound on its error.

    With n products a result element, :math:`A = |x| |W|^\top + |b|` and :math:`u_o` the unit
    roundoff of the result's format,

    .. math:: |\hat y - y| \le \gamma_n A (1 + u_o) + u_o |y| + \eta

    (Higham, section 3.5, with one more rounding into the result's format). The terms with
    :math:`u_o` fall away where the result's format is that of the sums. A bias is one more term of
    the sum; where the result's format is narrower than the sums', a product rounded before the
    bias is added is allowed too, which costs another :math:`u_o |x W^\top|` and :math:`1 + u_o`.
    :math:`\eta` is what products that underflow can lose. Where every product is zero, so is the
    bound.

    Where the engine computed from other inputs than were stored, :math:`|x - \tilde x| \le \delta`
    (`inputs`), a product with them is off by :math:`\Delta = \delta |W|^\top` and their sums by
    rounding errors of what is that much larger:

    .. math:: |\hat y - y| \le (\gamma_n (A + \Delta) + \Delta) (1 + u_o) + u_o |y| + \eta

    Parameters
    ----------
    x : Array, shape [..., K]
        The operation's input, as it was stored: no bound can know of an earlier rounding.
    weight : Array, shape [N, K]
        The matrix.
    bias : Array, shape [N], optional
        Added to each row.
    dtype : str, optional
        The format of the result: 'float16', 'bfloat16', 'float32' or 'float64'; that of `x` if not
        given.
    accumulate : str, optional
        The format that sums are kept in; float32, or float64 for float64 `x`, if not given.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero, as XLA does on CPUs.
    inputs : str, optional
        The format that `x` was rounded to where it was stored, though the engine computed from
        what it was before, in the format of the sums. Nothing is if it has all digits of that.

    Returns
    -------
    Bound
        Of shape [..., N]. ``usual`` has :math:`4 \sqrt n u` in the place of :math:`\gamma_n`, and
        :math:`4 \sqrt{\delta^2 (W^2)^\top}` in the place of :math:`\Delta`.

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
    out, sums = formats("x", x, dtype, accumulate)
    float_format("weight", weight)
    x64, w, b = float64(x), to_numpy(weight), None if bias is None else float64(bias)
    if x64.ndim < 1 or w.ndim != 2 or x64.shape[-1] != w.shape[1]:
        raise ValueError(
            f"weight: expected shape [N, K] for x [..., K], got {list(w.shape)} "
            f"for x {list(x64.shape)}"
        )
    if b is not None and b.shape != (w.shape[0],):
        raise ValueError(f"bias: expected shape [{w.shape[0]}], got {list(b.shape)}")
    before = narrowing(known_format("inputs", inputs), sums)
    rows = x64.reshape(math.prod(x64.shape[:-1]), x64.shape[-1])
    blocks = [
        _linear_block(
            rows,
            w[start : start + BLOCK_ROWS].astype(np.float64),
            None if b is None else b[start : start + BLOCK_ROWS],
            out,
            sums,
            flushes,
            before,
        )
        for start in range(0, max(1, w.shape[0]), BLOCK_ROWS)
    ]
    shape = (*x64.shape[:-1], w.shape[0])
    return Bound(
        *(np.concatenate(parts, axis=1).reshape(shape) for parts in zip(*blocks, strict=True))
    )


def _linear_block(
    x: Float64Array,
    w: Float64Array,
    b: Float64Array | None,
    out: FloatFormat,
    sums: FloatFormat,
    flushes: bool,
    before: FloatFormat | None,
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """The exact product, the limit and the usual error for a block of a weight's rows."""
    n = x.shape[1] + (b is not None)
    off, finite_w = input_error(x, before), finite_magnitude(w)
    finite_x = finite_magnitude(x) + off
    with np.errstate(invalid="ignore", over="ignore"):
        # In another order than `linear` sums in: a float64 result is not held against itself.
        product = np.ascontiguousarray(x[:, ::-1]) @ np.ascontiguousarray(w[:, ::-1]).T
        exact = product if b is None else product + b
        magnitude = finite_x @ finite_w.T
        if b is not None:
            magnitude += finite_magnitude(b)
        rounding = np.zeros_like(magnitude)
        if out is not sums:
            rounding += out.unit_roundoff * np.abs(exact) + out.smallest_subnormal
            if b is not None:
                rounding += out.unit_roundoff * np.abs(product)
        # What the float64 product itself can be off by, which matters for float64 results alone.
        rounding += gamma(n, FLOATS["float64"].unit_roundoff) * magnitude
        underflow = n * sums.smallest_subnormal
        if flushes:
            lost = finite_x.sum(axis=1)[:, None] + finite_w.sum(axis=1) + 2 * n
            underflow = np.maximum(underflow, sums.smallest_normal * lost)
        widening = 1.0 if out is sums else (1 + out.unit_roundoff) ** (1 if b is None else 2)
        most, usually = carried((off, finite_w.T))
        grown = gamma(n, sums.unit_roundoff) * magnitude + most
        grown_usually = usual_growth(n, sums.unit_roundoff) * magnitude + usually
        limit = (grown + underflow) * widening + rounding
        usual = (grown_usually + underflow) * widening + rounding
    exactly_zero = (magnitude == 0) & (sums.name != "float64")
    for bound, growth in ((limit, grown), (usual, grown_usually)):
        can_overflow = ~(magnitude + growth < sums.max)
        can_overflow |= np.isfinite(exact) & (np.abs(exact) + bound >= out.max)
        if b is not None and out is not sums:  # the product alone may be rounded, too
            can_overflow |= np.isfinite(product) & (np.abs(product) + bound >= out.max)
        bound[can_overflow] = np.inf
        bound[exactly_zero] = 0.0
    return exact, limit, usual
