"""Logits that were written as something else that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.bounds import Bound, gamma
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import Change, Float64Array, Hypothesis
from llama_layers.verify.operations import Formats, Linear


def _mean(y: Float64Array) -> Float64Array:
    return np.asarray(np.mean(y, axis=-1, keepdims=True))


def _largest(y: Float64Array) -> Float64Array:
    return np.asarray(np.max(y, axis=-1, keepdims=True))


def _log_of_sum(y: Float64Array) -> Float64Array:
    """The logarithm of the sum of exponentials."""
    largest = _largest(y)
    return np.asarray(largest + np.log(np.sum(np.exp(y - largest), axis=-1, keepdims=True)))


@dataclass(frozen=True, eq=False)
class _Less:
    """Logits less one number a token, which is made of all of that token's.

    Mean, maximum and logarithm of the sum of exponentials are off by no more than the logits are at
    the most. Each is a sum over the vocabulary, but for the maximum, and a few roundings.
    """

    logits: Computable
    shift: Callable[[Float64Array], Float64Array]

    def bound(self, formats: Formats) -> Bound:
        """The exact differences, and what rounding allows."""
        bound = self.logits.bound(formats)
        shift = self.shift(bound.exact)
        size = np.abs(bound.exact) + np.abs(shift)
        out, sums = (FLOATS[f].unit_roundoff for f in (formats.dtype, formats.accumulate))
        summed = gamma(bound.exact.shape[-1] + 4, sums) * (1 + _largest(np.abs(bound.exact)))
        own = 4 * out * size + summed
        limit, usual = (y + _largest(y) + own for y in (bound.limit, bound.usual))
        return Bound(bound.exact - shift, limit, usual)


@dataclass(frozen=True, eq=False)
class _Softmax:
    """Probabilities of the tokens of the vocabulary."""

    logits: Computable

    def bound(self, formats: Formats) -> Bound:
        """The exact probabilities, and what rounding allows."""
        less = _Less(self.logits, _log_of_sum).bound(formats)
        exact = np.exp(less.exact)
        rounding = 4 * FLOATS[formats.dtype].unit_roundoff
        tiny = FLOATS[formats.dtype].smallest_normal
        limit, usual = (exact * (np.expm1(y) + rounding) + tiny for y in (less.limit, less.usual))
        return Bound(exact, limit, usual)


def _shifted(
    shift: Callable[[Float64Array], Float64Array],
) -> Callable[[Linear, FailingSite], Iterator[Computable]]:
    def changes(linear: Linear, failing: FailingSite) -> Iterator[Computable]:
        if failing.site.role == "lm_head":
            yield _Less(failing, shift)

    return changes


def _probabilities(linear: Linear, failing: FailingSite) -> Iterator[Change | Computable]:
    if failing.site.role == "lm_head":
        yield _Softmax(failing)


HYPOTHESES = (
    Hypothesis(
        "logits centred",
        Linear,
        _shifted(_mean),
        "The array is the logits less their mean over the vocabulary; it should be the logits.",
    ),
    Hypothesis(
        "logits less their maximum",
        Linear,
        _shifted(_largest),
        "The array is the logits less the largest of each token; it should be the logits.",
    ),
    Hypothesis(
        "log-probabilities for logits",
        Linear,
        _shifted(_log_of_sum),
        "The array is the logarithm of the softmax of the logits; it should be the logits.",
    ),
    Hypothesis(
        "probabilities for logits",
        Linear,
        _probabilities,
        "The array is the softmax of the logits; it should be the logits.",
    ),
)
