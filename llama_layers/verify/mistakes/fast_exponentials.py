"""Softmax with approximate exponentials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np

from llama_layers.verify.attention import Heads
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.near import weighed
from llama_layers.verify.mistakes.registry import Changed, mistake
from llama_layers.verify.mistakes.weighing import WEIGHING, hidden_at
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

# By how much the exponent is lowered, in units of 2^-20: none, and what is best in some way (N.
# Schraudolph, "A fast, compact approximation of the exponential function", Neural Computation 11,
# 1999).
_LOWERED = (0, 45799, 60801, 68243, 90253)
_SQUARINGS = range(3, 13)


def _by_bits(x: Float64Array, lowered: float) -> Float64Array:
    """A number whose bits are those of the exponent, scaled: linear between powers of two."""
    y = x * np.log2(np.e) - lowered
    whole = np.floor(y)
    return np.exp2(whole) * (1 + y - whole)


def _quadratic(x: Float64Array) -> Float64Array:
    """A parabola between powers of two that meets them with slopes that fit."""
    y = x * np.log2(np.e)
    part = y - np.floor(y)
    return np.exp2(np.floor(y)) * (1 + part * (2 + part) / 3)


def _by_squares(x: Float64Array, squarings: int) -> Float64Array:
    count = 2.0**squarings
    return np.maximum(1 + x / count, 0.0) ** count


def _approximations() -> Iterator[tuple[Callable[[Float64Array], Float64Array], str]]:
    for lowered in _LOWERED:
        less = lowered / 2**20
        said = f"from the bits of a number (linear between powers of two, lowered by {less:.6g})"
        yield partial(_by_bits, lowered=less), said
    yield _quadratic, "by a parabola between powers of two"
    for squarings in _SQUARINGS:
        power = 2**squarings
        yield partial(_by_squares, squarings=squarings), f"as (1 + x / {power})^{power}"


def _with(heads: Heads, function: Callable[[Float64Array], Float64Array]) -> Tracked:
    scores = hidden_at(heads, 0.0)
    seen = np.isfinite(hidden_at(heads, -np.inf).exact)
    largest = hidden_at(heads, -np.inf).max()
    weights = (scores - largest).apply(function, slope=1.5).where(seen, 0.0)
    return heads.weigh(weights / weights.sum())


@mistake(WEIGHING, "exponentials approximated")
def _(operation: WEIGHING, at: FailingSite) -> Iterator[Changed]:
    """Takes exponentials {0}; it should take them as exact as the format is."""
    known = None if (at.ratio > 1).any() else 1
    for function, said in islice(_approximations(), known):
        if found := weighed(operation, at, _with, function):
            yield found, said
