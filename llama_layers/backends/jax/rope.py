"""Cosines and sines of positions that `jax.jit` traces, as exact as those of NumPy.

Phases need float64, which jax has only where it was enabled. Without it the phase of position p is
the sum of two, those of 1024 (p // 1024) and of p % 1024. Their cosines and sines are rows of
tables that NumPy makes in float64, and

    cos(a + b) = cos a cos b - sin a sin b,    sin(a + b) = sin a cos b + cos a sin b.

Each number of the tables is three of float32, which hold 48 bits together, and have so few that the
large products are exact. The sum of the products keeps what each addition rounds away (T. Ogita,
S. Rump and S. Oishi, "Accurate Sum and Dot Product", algorithm 4.3). So the result is rounded once,
as that of NumPy's table is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import accumulate_format, float_format
from llama_layers.arrays.tracing import is_traced
from llama_layers.arrays.types import Array, Namespace
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.rope import attention_factor, check_known_length, inv_freq

if TYPE_CHECKING:
    import jax

ROWS = 1024
"""Of each table: together they serve ROWS**2 positions."""

# Three arrays that sum to one: 12 bits, the next 12, and the rest.
Split: TypeAlias = "tuple[jax.Array, ...]"


def angle_table(
    xp: Namespace, positions: Array, config: LlamaConfig, like: Array
) -> tuple[Array, Array]:
    """Cosines and sines of traced positions; NaN outside 0 to ROWS**2 - 1."""
    if not is_traced(positions) or accumulate_format(float_format("like", like)).name == "float64":
        return NotImplemented
    check_known_length(config)
    places = xp.astype(positions, xp.asarray(0).dtype)  # wide enough for ROWS
    valid = (places >= 0) & (places < ROWS**2)
    high, low = _tables(config)
    cos_a, sin_a = (_rows(xp, table, places // ROWS) for table in high)
    cos_b, sin_b = (_rows(xp, table, places % ROWS) for table in low)
    minus_sin_a = tuple(-part for part in sin_a)
    cos = _sum_of_products((cos_a, cos_b), (minus_sin_a, sin_b))
    sin = _sum_of_products((sin_a, cos_b), (cos_a, sin_b))
    valid = xp.expand_dims(valid, axis=-1)
    return xp.where(valid, cos, xp.nan), xp.where(valid, sin, xp.nan)


@cache
def _tables(config: LlamaConfig) -> tuple[tuple[NDArray[np.float32], ...], ...]:
    """Cosines and sines, split, of the multiples of ROWS and of the positions below it.

    The factor of "yarn" is in the second.
    """
    speeds, factor = inv_freq(config), attention_factor(config)
    places = np.arange(ROWS, dtype=np.float64)[:, None]
    first, second = places * ROWS * speeds, places * speeds
    return (
        (_split(np.cos(first)), _split(np.sin(first))),
        (_split(np.cos(second) * factor), _split(np.sin(second) * factor)),
    )


def _split(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Three float32 arrays, stacked, that sum to float64 numbers: of 12, 12 and 24 bits."""
    parts = []
    for bits in (12, 12, 24):
        fraction, exponent = np.frexp(numbers)
        part = np.ldexp(np.round(fraction * 2**bits), exponent - bits)
        parts.append(part.astype(np.float32))
        numbers = numbers - part
    return np.stack(parts)


def _rows(xp: Namespace, table: NDArray[np.float32], index: jax.Array) -> Split:
    return tuple(xp.take(xp.asarray(part), index, axis=0, mode="clip") for part in table)


def _sum_of_products(*pairs: tuple[Split, Split]) -> jax.Array:
    """The sum of x y over some pairs, as if in about twice the precision, and rounded once."""
    exact, small = [], []
    for (x1, x2, x3), (y1, y2, y3) in pairs:
        exact += [x1 * y1, x1 * y2, x2 * y1]  # 24 bits each
        small += [x2 * y2, x1 * y3, x3 * y1, x2 * y3, x3 * y2]
    return _compensated_sum(exact, small)


def _compensated_sum(terms: Sequence[jax.Array], rest: Sequence[jax.Array]) -> jax.Array:
    total, lost = terms[0], sum(rest[1:], rest[0])
    for term in terms[1:]:
        together = total + term
        back = together - total
        lost = lost + ((total - (together - back)) + (term - back))
        total = together
    return total + lost
