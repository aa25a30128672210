"""Rounding of attention's scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_layers.arrays.checks import check_finite
from llama_layers.arrays.dtypes import FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    beyond,
    carried,
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

# Scores held in float64 at a time, in each of the arrays that a bound is made of: 8 MiB.
TILE = 1 << 20


@dataclass(frozen=True)
class Errors:
    """Results, and the errors that a computation of them can make and usually makes."""

    exact: Float64Array
    largest: Float64Array
    usual: Float64Array


@dataclass(frozen=True)
class ScoreRounding:
    """How an engine computes scores."""

    scale: float
    sums: FloatFormat
    between: FloatFormat | None
    """What products of queries and keys are rounded to, before and after they are scaled."""
    operands: FloatFormat | None
    """What queries and keys are rounded to."""
    flushes: bool
    before: FloatFormat | None
    """What queries and keys were rounded to after the engine had read them."""

    def errors(self, q: Float64Array, k: Float64Array) -> Errors:
        """Of the scores of q [..., S, D] and k [T, D]; infinite where they can overflow."""
        q, k = read_in(q, self.operands), read_in(k, self.operands)
        n, u, c = q.shape[-1] + 4, self.sums.unit_roundoff, abs(self.scale)
        off_q, off_k = input_error(q, self.before), input_error(k, self.before)
        size_q, size_k = finite_magnitude(q) + off_q, finite_magnitude(k) + off_k
        with np.errstate(all="ignore"):
            # In another order than `attention` sums in: a float64 result is not its own judge.
            product = np.ascontiguousarray(q[..., ::-1]) @ np.ascontiguousarray(k[:, ::-1]).T
            exact = product * self.scale
            magnitude = size_q @ size_k.T
            size = size_q.sum(axis=-1)[..., None] + size_k.sum(axis=-1)
            underflow = lost_to_underflow(self.sums, self.flushes) * (size + 2 * n)
            moved = carried((off_q, finite_magnitude(k).T), (size_q, off_k.T))
            errors = []
            for grow, off in zip((gamma, usual_growth), moved, strict=True):
                growth = own_error(self.sums) * grow(n, u)
                error = growth * magnitude + off + underflow  # of the product, not scaled
                overflows = ~(max(1.0, c) * (magnitude + error) < self.sums.max)
                overflows |= beyond(product, error, self.between)
                error = rounded(error, product, self.between) * c + underflow
                overflows |= beyond(exact, error, self.between)
                error = rounded(error, exact, self.between)
                error[(magnitude == 0) & (self.sums.name != "float64")] = 0.0
                errors.append(np.where(overflows | self._too_large(q, k), np.inf, error))
        return Errors(exact, *errors)

    def _too_large(self, q: Float64Array, k: Float64Array) -> Any:
        """Where a query or a key does not fit the format it is rounded to."""
        if self.operands is None:
            return False
        rows, keys = (np.asarray(np.isinf(array).any(axis=-1)) for array in (q, k))
        return rows[..., None] | keys


def score_rounding(
    q: Any,
    k: Any,
    scale: float,
    sums: FloatFormat,
    scores: str | None,
    operands: str | None,
    flushes: bool,
    inputs: str | None,
) -> ScoreRounding:
    """The roundings of scores, of checked arguments."""
    scale = check_finite("scale", scale)
    stored, stored_k = float_format("q", q), float_format("k", k)
    widest = stored if stored.holds(stored_k) else stored_k
    return ScoreRounding(
        scale,
        sums,
        narrowing(known_format("scores", scores), sums),
        narrowing(known_format("operands", operands), widest),
        flushes,
        narrowing(known_format("inputs", inputs), sums),
    )


@dataclass(frozen=True)
class Tile:
    """Some queries of the heads that read one key head."""

    batch: int
    kv: int
    heads: slice
    rows: slice


def tiles(batch: int, queries: int, keys: int, heads: int, kv_heads: int) -> Iterator[Tile]:
    """All queries of all heads, so many at a time that a tile has some `TILE` scores."""
    group = heads // kv_heads
    step = max(1, TILE // max(1, group * keys))
    for b in range(batch):
        for h in range(kv_heads):
            for start in range(0, queries, step):
                rows = slice(start, min(start + step, queries))
                yield Tile(b, h, slice(h * group, (h + 1) * group), rows)


def check_heads(q: Any, **others: Any) -> None:
    """Refuse arrays that are not [B, S, heads, D] and [B, T, kv_heads, D]."""
    if q.ndim != 4:
        raise ValueError(f"q: expected shape [B, S, heads, D], got {list(q.shape)}")
    batch, _, heads, width = q.shape
    for name, array in others.items():
        if array.ndim != 4 or (array.shape[0], array.shape[3]) != (batch, width):
            raise ValueError(
                f"{name}: expected shape [{batch}, T, kv_heads, {width}], got {list(array.shape)}"
            )
        if not array.shape[2] or heads % array.shape[2]:
            raise ValueError(
                f"{name}: expected heads in a divisor of q's {heads}, got {array.shape[2]}"
            )


def scores_bound(
    q: Any,
    k: Any,
    /,
    *,
    scale: float,
    dtype: str | None = None,
    accumulate: str | None = None,
    scores: str | None = None,
    operands: str | None = None,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The scores of attention and the bound on their error.

    For :math:`a = c \, q \cdot k` of D products, with c the scale and :math:`A = |c| |q| |k|^\top`,

    .. math:: |\hat a - a| \le \gamma_{D+4} A (1 + u_o) + u_o |a| + \eta

    Beside D for the sum (Higham, section 3.1), 2 roundings are for c, itself rounded, and the
    product with it, before or after the sum; 2 more allow :math:`\sqrt{c}` in both factors. Grouped
    heads are not repeated: query head h reads key head ``h // (heads / kv_heads)``.

    Where the engine computed from other queries and keys than were stored, within :math:`\delta_q`
    and :math:`\delta_k` (`inputs`), their product is off by

    .. math:: \Delta = |c| (\delta_q |k|^\top + (|q| + \delta_q) \delta_k^\top),

    and its rounding errors are of :math:`A + \Delta`.

    Parameters
    ----------
    q : Array, shape [B, S, heads, D]
        Queries after RoPE, as they were stored.
    k : Array, shape [B, T, kv_heads, D]
        Keys after RoPE, as they were stored.
    scale : float
        The c above.
    dtype : str, optional
        The format of the result; that of `q` if not given.
    accumulate : str, optional
        The format that sums are kept in; float32, or float64 for float64 `q`, if not given.
    scores : str, optional
        A format that the products are rounded to, before and after they are scaled: each time
        another :math:`u_s |a|`.
    operands : str, optional
        A format that queries and keys are rounded to first, so that the exact scores are those
        of what they become.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that queries and keys were rounded to where they were stored, though the engine
        computed from what they were before, in the format of the sums. Nothing is if it has all
        digits of that.

    Returns
    -------
    Bound
        Of shape [B, heads, S, T]. ``usual`` has :math:`4 \sqrt{D + 4} u` in the place of
        :math:`\gamma_{D+4}`, and :math:`4 \sqrt{\sum}` of the squares in the place of the sums
        in :math:`\Delta`.

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
    out, sums = formats("q", q, dtype, accumulate)
    how = score_rounding(q, k, scale, sums, scores, operands, flushes, inputs)
    q64, k64 = to_numpy(q), to_numpy(k)
    check_heads(q64, k=k64)
    (batch, queries, heads, _), keys, kv_heads = q64.shape, k64.shape[1], k64.shape[2]
    shape = (batch, heads, queries, keys)
    exact, limit, usual = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    last = None if out is how.between else narrowing(out, sums)
    for tile in tiles(batch, queries, keys, heads, kv_heads):
        errors = how.errors(*tile_of(tile, q64, k64))
        place = (tile.batch, tile.heads, tile.rows)
        exact[place] = errors.exact
        for bound, error in ((limit, errors.largest), (usual, errors.usual)):
            bound[place] = rounded(error, errors.exact, last)
            bound[place][beyond(errors.exact, bound[place], out)] = np.inf
            bound[place][error == 0] = 0.0
    return Bound(exact, limit, usual)


def tile_of(tile: Tile, q: Any, k: Any) -> tuple[Float64Array, Float64Array]:
    """The queries [heads, S, D] and keys [T, D] of a tile, in float64."""
    queries = q[tile.batch, tile.rows, tile.heads].transpose(1, 0, 2)
    return queries.astype(np.float64), k[tile.batch, :, tile.kv].astype(np.float64)
