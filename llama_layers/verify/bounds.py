r"""How far a correct result can lie from the exact one.

Every bound here holds for any order of summation, fused multiply-adds or not. It is computed
beside the exact result, in float64, from the numbers that the operation was given, so that nothing
inherited from earlier operations counts.

Notation: :math:`u` is the unit roundoff of the format that sums are kept in,
:math:`\gamma_n = n u / (1 - n u)` bounds the product of n factors :math:`1 + \delta` with
:math:`|\delta| \le u` (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, SIAM
2002, lemma 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.dtypes import FLOATS, FloatFormat, accumulate_format, float_format
from llama_layers.backends.transfer import to_numpy

Float64Array = NDArray[np.float64]

# Rows of a weight that are held in float64 at a time.
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Bound:
    """An exact result, and how far from it a computed one can be.

    Attributes
    ----------
    exact : ndarray of float64
        The operation in float64, on the numbers as they were stored.
    limit : ndarray of float64
        No correct computation errs by more: beyond it is a FAIL. Infinite where nothing can be
        said: the computation can overflow, or sums so many products in so few bits that all may
        be lost.
    usual : ndarray of float64
        Correct computations stay within it in practice, since rounding errors cancel (N. Higham
        and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
        Comput. 41, 2019): beyond it is a WARN.
    """

    exact: Float64Array
    limit: Float64Array
    usual: Float64Array

    def ratio(self, computed: Any, /) -> Float64Array:
        """The error of each element over its limit.

        Parameters
        ----------
        computed : Array, the shape of `exact`
            The result to judge, of any library and float dtype.

        Returns
        -------
        ndarray of float64
            At most 1 where the result can be correct; 0 where it is exact, infinite where it is
            not a number and should be, and where it differs though rounding has no part in it.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        return _error_over(self.limit, self.exact, computed)

    def usual_ratio(self, computed: Any, /) -> Float64Array:
        """The error of each element over what is usual; see `ratio`.

        Parameters
        ----------
        computed : Array, the shape of `exact`
            The result to judge.

        Returns
        -------
        ndarray of float64
            Above 1 where the result deserves a second look.
        """
        return _error_over(self.usual, self.exact, computed)

    def only(self, places: Any, /) -> Bound:
        """The bound for some elements; the others may be anything.

        Parameters
        ----------
        places : ndarray of bool, broadcastable to the shape of `exact`
            True for the elements that are judged.

        Returns
        -------
        Bound
            With no limit elsewhere.
        """
        return replace(
            self,
            limit=np.where(places, self.limit, np.inf),
            usual=np.where(places, self.usual, np.inf),
        )


def _error_over(limit: Float64Array, exact: Float64Array, computed: Any) -> Float64Array:
    float_format("computed", computed)
    values = to_numpy(computed).astype(np.float64)
    if values.shape != exact.shape:
        raise ValueError(f"computed: expected shape {list(exact.shape)}, got {list(values.shape)}")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(values - exact)
        ratio = np.where(error == 0, 0.0, error / limit)
    same = (values == exact) | (np.isnan(values) & np.isnan(exact))
    ratio[~same & ~(np.isfinite(values) & np.isfinite(exact))] = np.inf
    ratio[same | np.isinf(limit)] = 0.0
    return ratio


def linear_bound(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    flushes: bool = False,
) -> Bound:
    r"""The exact `llama_layers.linear` and the bound on its error.

    With n products a result element, :math:`A = |x| |W|^\top + |b|` and :math:`u_o` the unit
    roundoff of the result's format,

    .. math:: |\hat y - y| \le \gamma_n A (1 + u_o) + u_o |y| + \eta

    (Higham, section 3.5, with one more rounding into the result's format). The terms with
    :math:`u_o` fall away where the result's format is that of the sums. A bias is one more term of
    the sum; where the result's format is narrower than the sums', a product rounded before the
    bias is added is allowed too, which costs another :math:`u_o |x W^\top|`. :math:`\eta` is what
    products that underflow can lose. Where every product is zero, so is the bound.

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

    Returns
    -------
    Bound
        Of shape [..., N]. ``usual`` has :math:`4 \sqrt n u` in the place of :math:`\gamma_n`.

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
    out, sums = _formats("x", x, dtype, accumulate)
    float_format("weight", weight)
    x64, w, b = _float64(x), to_numpy(weight), None if bias is None else _float64(bias)
    if x64.ndim < 1 or w.ndim != 2 or x64.shape[-1] != w.shape[1]:
        raise ValueError(
            f"weight: expected shape [N, K] for x [..., K], got {list(w.shape)} "
            f"for x {list(x64.shape)}"
        )
    if b is not None and b.shape != (w.shape[0],):
        raise ValueError(f"bias: expected shape [{w.shape[0]}], got {list(b.shape)}")
    rows = x64.reshape(math.prod(x64.shape[:-1]), x64.shape[-1])
    blocks = [
        _linear_block(
            rows,
            w[start : start + BLOCK_ROWS].astype(np.float64),
            None if b is None else b[start : start + BLOCK_ROWS],
            out,
            sums,
            flushes,
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
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """The exact product, the limit and the usual error for a block of a weight's rows."""
    n = x.shape[1] + (b is not None)
    finite_x, finite_w = _finite_magnitude(x), _finite_magnitude(w)
    with np.errstate(invalid="ignore", over="ignore"):
        # In another order than `linear` sums in: a float64 result is not held against itself.
        product = x[:, ::-1] @ w[:, ::-1].T
        exact = product if b is None else product + b
        magnitude = finite_x @ finite_w.T
        if b is not None:
            magnitude += _finite_magnitude(b)
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
        widening = 1 + (0.0 if out is sums else out.unit_roundoff)
        grown = gamma(n, sums.unit_roundoff) * magnitude
        grown_usually = usual_growth(n, sums.unit_roundoff) * magnitude
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


def rms_norm_bound(
    x: Any,
    weight: Any,
    /,
    *,
    eps: float,
    dtype: str | None = None,
    accumulate: str | None = None,
    root_ulps: float = 1.0,
    flushes: bool = False,
) -> Bound:
    r"""The exact `llama_layers.rms_norm` and the bound on its error.

    The mean square is a sum of positive terms, so its error is relative to itself: n roundings in
    the sum of squares, at most two in the division by n, one in eps and one in adding it make
    :math:`\gamma_{n+4}`, of which the root keeps about half. The root and the quotient by it err
    by one unit in the last place of the sums' format (`root_ulps`), the two products by one
    rounding each:

    .. math:: |\hat y - y| \le \left( \frac{(1 + 2 u r)(1 + u)^2}{\sqrt{1 - \gamma_{n+4}}}
        - 1 \right) |y| (1 + u_o) + u_o |y| + \eta

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
    root_ulps : float, optional
        What is assumed of the engine: the error of its reciprocal root, in units in the last
        place. A root and a division that are each rounded correctly are within 1.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.

    Returns
    -------
    Bound
        Of the shape of `x`. ``usual`` has :math:`4 \sqrt n u` in the place of :math:`\gamma_n`.

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
    out, sums = _formats("x", x, dtype, accumulate)
    float_format("weight", weight)
    x64, w64 = _float64(x), _float64(weight)
    if x64.ndim < 1 or w64.shape != (x64.shape[-1],):
        raise ValueError(
            f"weight: expected shape [H] for x [..., H], got {list(w64.shape)} "
            f"for x {list(x64.shape)}"
        )
    n, u = x64.shape[-1], sums.unit_roundoff
    lost = sums.smallest_normal if flushes else sums.smallest_subnormal
    with np.errstate(all="ignore"):
        reversed64 = x64[..., ::-1]  # as in `_linear_block`, another order than is judged
        mean_square = np.mean(reversed64 * reversed64, axis=-1, keepdims=True)
        normed = x64 / np.sqrt(mean_square + eps)
        exact = normed * w64
        magnitude = np.abs(exact)
        underflow = lost * (2 + np.abs(w64)) + out.smallest_subnormal * (out is not sums)
        if flushes:  # x and the weight may be taken for zero before anything is computed
            underflow = underflow + lost * (np.abs(w64) / np.sqrt(mean_square + eps))
            underflow += lost * np.abs(normed)
        lost_squares = 2 * lost / (mean_square + eps)

        def error(growth: float) -> Float64Array:
            mean_error = growth + lost_squares + gamma(n + 4, FLOATS["float64"].unit_roundoff)
            root = np.where(mean_error < 1, np.sqrt(1 - np.minimum(mean_error, 1)), 0.0)
            relative = (1 + 2 * u * root_ulps) * (1 + u) ** 2 / root - 1
            rounding = 0.0 if out is sums else out.unit_roundoff
            total: Float64Array = (relative * (1 + rounding) + rounding) * magnitude + underflow
            return total

        limit = error(gamma(n + 4, u))
        usual = error(usual_growth(n + 4, u))
        sum_of_squares = n * mean_square * (1 + gamma(n, u))
        can_overflow = ~(sum_of_squares < sums.max) & np.isfinite(mean_square)
        can_overflow = can_overflow | (np.isfinite(exact) & (np.abs(exact) + limit >= out.max))
        # Squares that all underflow leave a root of zero, and rows of Inf and NaN.
        can_overflow |= np.isfinite(exact) & (gamma(n + 4, u) + lost_squares >= 1)
    zero = (x64 == 0) | (w64 == 0)
    for bound in (limit, usual):
        bound[np.broadcast_to(zero, bound.shape) & np.isfinite(exact)] = 0.0
        bound[np.broadcast_to(can_overflow, bound.shape)] = np.inf
    return Bound(exact, limit, usual)


def gamma(n: int, u: float) -> float:
    r""":math:`\gamma_n`, the largest relative error of n roundings; infinite where n u is 1."""
    return n * u / (1 - n * u) if n * u < 1 else math.inf


def usual_growth(n: int, u: float) -> float:
    r""":math:`4 \sqrt n u`, which n roundings rarely exceed, or :math:`\gamma_n` where smaller."""
    return min(4 * math.sqrt(n) * u, gamma(n, u))


def _formats(
    name: str, x: Any, dtype: str | None, accumulate: str | None
) -> tuple[FloatFormat, FloatFormat]:
    """The formats of a result and of its sums."""
    stored = float_format(name, x)
    for argument, value in (("dtype", dtype), ("accumulate", accumulate)):
        if value is not None and value not in FLOATS:
            raise ValueError(f"{argument}: expected one of {', '.join(FLOATS)}, got {value!r}")
    return FLOATS[dtype or stored.name], FLOATS[accumulate or accumulate_format(stored).name]


def _float64(array: Any) -> Float64Array:
    return to_numpy(array).astype(np.float64)


def _finite_magnitude(array: Float64Array) -> Float64Array:
    return np.where(np.isfinite(array), np.abs(array), 0.0)
