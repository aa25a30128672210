"""Mistakes of one number, which is fitted to the port's own array: a scale, a cap, a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds import Bound
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Float64Array,
    Hypothesis,
    Kind,
    wide,
)
from llama_layers.verify.hypotheses.weighing import Weighed, exponentials, scores_of, values_of
from llama_layers.verify.operations import Attention, Formats, Linear

# Queries, and outputs, that numbers are fitted to: the last and the first.
_FEW = 16
_GOLDEN = (5**0.5 - 1) / 2


def _fitted(error: Callable[[float], float], low: float, high: float) -> float:
    """Where an error is least: the best of a grid of ratios, and a golden section around it."""
    grid = np.geomspace(low, high, 97)
    best = int(np.argmin([error(float(number)) for number in grid]))
    a, b = np.log(grid[max(best - 1, 0)]), np.log(grid[min(best + 1, len(grid) - 1)])
    for _ in range(60):
        c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        a, b = (a, d) if error(float(np.exp(c))) <= error(float(np.exp(d))) else (c, b)
    return float(np.exp((a + b) / 2))


def _capped(y: Float64Array, cap: float) -> Float64Array:
    return np.asarray(cap * np.tanh(y / cap))


def _error_of_queries(
    attention: Attention,
    failing: FailingSite,
    change: Callable[[Float64Array, float], Float64Array],
) -> Callable[[float], float]:
    """How far attention with changed scores is from the port's, in its last queries."""
    last = replace(attention, q=attention.q[:, -_FEW:])
    scores, _ = scores_of(last)
    v, theirs = values_of(last, scores.shape[1]), wide(failing.computed)[:, -_FEW:]
    mask = np.asarray(attention.mask)[:, None, -_FEW:]
    allowed = np.broadcast_to(mask, scores.shape)

    def error(number: float) -> float:
        y = _softmax(change(scores, number), allowed) @ v
        return float(np.nansum(np.square(y.transpose(0, 2, 1, 3) - theirs)))

    return error


def _softmax(scores: Float64Array, allowed: Any) -> Float64Array:
    weights = exponentials(scores, allowed)
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / np.where(total == 0, 1.0, total))


def _score_cap(attention: Attention, failing: FailingSite) -> Iterator[Change]:
    cap = _fitted(_error_of_queries(attention, failing, _capped), 1e-1, 1e3)
    yield Change(
        Weighed(attention, lambda s, allowed: _softmax(_capped(s, cap), allowed), False),
        f"The port seems to cap scores s as {cap:.4g} tanh(s / {cap:.4g}), as Gemma 2 does; Llama "
        "does not.",
    )


def _scale(attention: Attention, failing: FailingSite) -> Iterator[Change]:
    times = _fitted(_error_of_queries(attention, failing, np.multiply), 1e-2, 1e2)
    yield Change(
        replace(attention, scale=times * attention.scale),
        f"The port seems to scale scores with {times * attention.scale:.6g}; it should be "
        f"1 / sqrt(D), {attention.scale:.6g}.",
    )


@dataclass(frozen=True, eq=False)
class _CappedLogits:
    operation: Computable
    cap: float

    def bound(self, formats: Formats) -> Bound:
        """The logits capped; a step rounds once, and none of them lets an error grow."""
        bound = self.operation.bound(formats)
        exact = _capped(bound.exact, self.cap)
        steps = 4 * FLOATS[formats.dtype].unit_roundoff * np.abs(exact)
        return Bound(exact, bound.limit + steps, bound.usual + steps)


def _logit_cap(linear: Linear, failing: FailingSite) -> Iterator[Change]:
    if failing.site.role != "lm_head":
        return
    exact, theirs = failing.bound(failing.formats).exact, wide(failing.computed)
    exact, theirs = exact[:, -_FEW:], theirs[:, -_FEW:]
    cap = _fitted(lambda c: float(np.nansum(np.square(_capped(exact, c) - theirs))), 1e-1, 1e3)
    yield Change(
        _CappedLogits(failing, cap),
        f"The port seems to cap logits y as {cap:.4g} tanh(y / {cap:.4g}), as Gemma 2 does; Llama "
        "does not.",
    )


def _another_tokens_logits(linear: Linear, failing: FailingSite) -> Iterator[Change]:
    """Where one token was kept: for each sequence the one whose logits these are."""
    rows = failing.recorded.arrays.get("model.norm")
    if failing.site.role != "lm_head" or failing.computed.shape[1] != 1 or rows is None:
        return
    rows = to_numpy(rows)
    exact = wide(rows) @ wide(linear.weight[:_FEW]).T
    error = np.sum(np.square(exact - wide(failing.computed[..., :_FEW])), axis=-1)
    tokens = np.argmin(np.nan_to_num(error, nan=np.inf), axis=1)
    said = ", ".join(map(str, tokens[:6])) + (" ..." if len(tokens) > 6 else "")
    yield Change(
        replace(linear, x=rows[np.arange(len(rows)), tokens][:, None]),
        f"The port seems to have the logits of token {said}; they should be of the last, "
        f"{rows.shape[1] - 1}.",
    )


HYPOTHESES = (
    Hypothesis("scores capped", Attention, _score_cap, kind=Kind.SOLVED),
    Hypothesis("scores scaled", Attention, _scale, kind=Kind.SOLVED),
    Hypothesis("logits capped", Linear, _logit_cap, kind=Kind.SOLVED),
    Hypothesis("another token's logits", Linear, _another_tokens_logits, kind=Kind.SOLVED),
)
