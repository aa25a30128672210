"""Mistakes in how attention weighs: with another function of scores and mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, FloatFormat
from llama_layers.verify.bounds import Bound, gamma
from llama_layers.verify.bounds.bound import read_in
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import Float64Array, Hypothesis, wide
from llama_layers.verify.operations import Attention, Formats, Probabilities, Softmax, WeightedSum

_Operations = Attention | Probabilities | Softmax
_Function = Callable[[Float64Array, NDArray[np.bool_]], Float64Array]


def values_of(operation: Attention | WeightedSum, heads: int) -> Float64Array:
    """The values of each query head, [B, heads, T, D]."""
    v = wide(operation.v).transpose(0, 2, 1, 3)
    return np.repeat(v, heads // v.shape[1], axis=1)


def scores_of(operation: Any) -> tuple[Float64Array, Float64Array]:
    """Scores [B, heads, S, T], and the magnitudes that they are summed from."""
    if isinstance(operation, Softmax):
        scores = wide(operation.scores)
        return scores, np.abs(scores)
    q, k = (wide(y).transpose(0, 2, 3, 1) for y in (operation.q, operation.k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    q = q.swapaxes(-1, -2) * operation.scale
    return q @ k, np.abs(q) @ np.abs(k)


@dataclass(frozen=True, eq=False)
class Weighed:
    r"""Attention with weights :math:`w_t = f(a_t)` of the scores, or those weights themselves.

    A score errs by :math:`\delta_t`, of summing D products, of inputs that had more digits, and
    of its own rounding where a profile does that. Exponentials, divided by a sum of others or
    not, err by a relative :math:`e^{\delta_t + \max \delta} - 1` from these, and by so many
    roundings of their own. Scores that weigh themselves err by :math:`\delta_t`.
    """

    operation: Any
    function: _Function
    themselves: bool

    def bound(self, formats: Formats) -> Bound:
        """The exact result, and what rounding allows."""
        out, sums, profile = FLOATS[formats.dtype], FLOATS[formats.accumulate], formats.profile
        cache = None if profile.kv_cache is None else FLOATS[profile.kv_cache]
        operation = self._read(cache)
        read = 0.0
        if formats.unrounded_inputs is not None:
            before = FLOATS[formats.unrounded_inputs].unit_roundoff
            read = before * (1 + before)
        scores, products = scores_of(operation)
        keys, u = scores.shape[-1], sums.unit_roundoff
        terms = 0 if isinstance(operation, Softmax) else operation.q.shape[-1]
        allowed = np.broadcast_to(operation.mask[:, None], scores.shape)
        with np.errstate(all="ignore"):
            weights = self.function(scores, allowed)
            delta = products * (gamma(terms + 4, u) + 2 * read + read**2)
            delta += np.abs(scores) * (4 * u + 3 * out.unit_roundoff * profile.scores)
            delta = np.where(allowed | (weights != 0), delta, 0.0)
            own = gamma(2 * keys + 20, u) + 2 * out.unit_roundoff * profile.probabilities
            grown = np.expm1(delta + delta.max(axis=(-1, -2), keepdims=True))
            error = (delta if self.themselves else np.abs(weights) * grown) * (1 + own)
            error += np.abs(weights) * own
            exact = weights
            if isinstance(operation, Attention):
                if cache is not None:
                    error = error + (np.abs(weights) + error) * cache.unit_roundoff
                v = values_of(operation, scores.shape[1])
                summed = gamma(keys + 2, u) + read
                error = error @ np.abs(v) * (1 + summed) + np.abs(weights) @ np.abs(v) * summed
                exact, error = ((y.transpose(0, 2, 1, 3)) for y in (weights @ v, error))
            limit = error * (1 + out.unit_roundoff) + out.unit_roundoff * np.abs(exact)
            limit += out.smallest_subnormal + sums.smallest_normal * profile.flushes
            limit = np.where(np.abs(exact) + limit >= out.max, np.inf, limit)
        return Bound(exact, limit, limit)

    def _read(self, cache: FloatFormat | None) -> Any:
        """The operation with what is read from a cache in its format."""
        names = [name for name in ("q", "k", "v") if hasattr(self.operation, name)]
        read = {name: read_in(wide(getattr(self.operation, name)), cache) for name in names}
        return replace(self.operation, **read)


def _weighed(
    *functions: _Function, themselves: bool = False
) -> Callable[[Any, FailingSite], Iterator[Computable]]:
    """Attention with weights that are another function of scores and mask."""

    def changes(operation: Any, failing: FailingSite) -> Iterator[Computable]:
        for function in functions:
            yield Weighed(operation, function, themselves)

    return changes


def exponentials(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    """Of the scores above their largest; zeros for what is not allowed."""
    hidden = np.where(allowed, scores, -np.inf)
    largest = hidden.max(axis=-1, keepdims=True)
    return np.asarray(np.exp(hidden - np.where(np.isfinite(largest), largest, 0)))


def _over_queries(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = np.exp(np.where(allowed, scores, -np.inf) - scores.max())
    return np.asarray(weights / weights.sum(axis=-2, keepdims=True))


def _over_queries_too(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = exponentials(scores, allowed)
    weights = weights / weights.sum(axis=-2, keepdims=True)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _unshifted(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return np.asarray(np.exp(np.where(allowed, scores, -np.inf)))


def _overflowing(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = np.exp(np.where(allowed, scores, -np.inf).astype(np.float32))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True)).astype(np.float64)


def _one_more(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = exponentials(scores, allowed)
    largest = np.where(allowed, scores, -np.inf).max(axis=-1, keepdims=True)
    return np.asarray(weights / (weights.sum(axis=-1, keepdims=True) + np.exp(-largest)))


def _masked_afterwards(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return _softmax(scores) * allowed


def _softmax(scores: Float64Array) -> Float64Array:
    weights = exponentials(scores, np.ones(scores.shape, bool))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _hidden_at(
    value: float, added: bool = False
) -> Callable[[Float64Array, NDArray[np.bool_]], Float64Array]:
    def weights(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
        return _softmax(np.where(allowed, scores, scores + value if added else value))

    return weights


def _scores_themselves(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return np.where(allowed, scores, 0.0)


HYPOTHESES = (
    Hypothesis(
        "softmax over the queries",
        _Operations,
        _weighed(_over_queries),
        "The port seems to normalise over the queries; it should be over the keys.",
    ),
    Hypothesis(
        "softmax over queries and keys",
        _Operations,
        _weighed(_over_queries_too),
        "The port seems to normalise over the queries and then over the keys; it should be over "
        "the keys alone.",
    ),
    Hypothesis(
        "softmax not normalised",
        _Operations,
        _weighed(exponentials),
        "The port seems not to divide the exponentials by their sum.",
    ),
    Hypothesis(
        "exponentials without softmax",
        _Operations,
        _weighed(_unshifted),
        "The port seems to weigh with the exponentials of the scores themselves.",
    ),
    Hypothesis(
        "softmax without the shift",
        _Operations,
        _weighed(_overflowing),
        "The port seems to take exponentials without subtracting the largest score, and they "
        "overflow.",
    ),
    Hypothesis(
        "softmax with one more",
        _Operations,
        _weighed(_one_more),
        "The port seems to add one to the sum of the exponentials.",
    ),
    Hypothesis(
        "masked after softmax",
        _Operations,
        _weighed(_masked_afterwards),
        "The port seems to hide keys after the softmax; they should be hidden before it.",
    ),
    Hypothesis(
        "hidden keys at -1e4",
        _Operations,
        _weighed(_hidden_at(-1e4), _hidden_at(-1e4, added=True)),
        "The port seems to give hidden keys a score of -1e4, which low scores come near; it should "
        "be minus infinity.",
    ),
    Hypothesis(
        "hidden keys at 0",
        _Operations,
        _weighed(_hidden_at(0.0)),
        "The port seems to give hidden keys a score of 0; it should be minus infinity.",
    ),
    Hypothesis(
        "softmax left out",
        _Operations,
        _weighed(_scores_themselves, themselves=True),
        "The port seems to weigh with the scores themselves; it should be their softmax.",
    ),
)
