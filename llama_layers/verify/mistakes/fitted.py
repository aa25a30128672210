"""Mistakes of one number, which is fitted to the port's own array: a scale, a cap, a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.verify.attention import Heads
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.attention import scale_words
from llama_layers.verify.mistakes.attention_arrays import (
    capped,
    scores_of,
    sinks_of,
    softmax,
    uncapped_scores,
    values_of,
)
from llama_layers.verify.mistakes.registry import Changed, Kind, evaluated, mistake
from llama_layers.verify.mistakes.weighing import lowered
from llama_layers.verify.operations import Attention, Linear
from llama_layers.verify.report.wording import listed
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

# Queries, and outputs, that numbers are fitted to: the last and the first.
_FEW = 16
_GOLDEN = (5**0.5 - 1) / 2


def fitted(error: Callable[[float], float], low: float, high: float) -> float:
    """Where an error is least: the best of a grid of ratios, and a golden section around it."""
    grid = np.geomspace(low, high, 97)
    best = int(np.argmin([error(float(number)) for number in grid]))
    a, b = np.log(grid[max(best - 1, 0)]), np.log(grid[min(best + 1, len(grid) - 1)])
    for _ in range(60):
        c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        a, b = (a, d) if error(float(np.exp(c))) <= error(float(np.exp(d))) else (c, b)
    return float(np.exp((a + b) / 2))


def _error_of_queries(
    attention: Attention, at: FailingSite, change: Callable[[Float64Array, float], Float64Array]
) -> Callable[[float], float]:
    """How far attention with changed scores is from the port's, in its last queries."""
    last = replace(attention, q=attention.q[:, -_FEW:])
    scores, sinks = uncapped_scores(last), sinks_of(last)
    v, theirs = values_of(last), wide(at.computed)[:, -_FEW:]
    mask = np.asarray(attention.mask)[:, None, -_FEW:]
    allowed = np.broadcast_to(mask, scores.shape)

    def error(number: float) -> float:
        y = softmax(change(scores, number), allowed, sinks) @ v
        return float(np.nansum(np.square(y.transpose(0, 2, 1, 3) - theirs)))

    return error


@mistake(Attention, "scores capped", kind=Kind.SOLVED)
def _(attention: Attention, at: FailingSite) -> Changed | None:
    """Caps scores y as {0:.4g} tanh(y / {0:.4g}); it should {1}."""
    cap = fitted(_error_of_queries(attention, at, capped), 1e-1, 1e3)
    right = attention.cap
    should = "leave them as they are" if right is None else f"cap them at {right:g}"
    attention = replace(attention, cap=None)

    def formula(heads: Heads) -> Tracked:
        scores = heads.scores().apply(partial(capped, cap=cap))
        return heads.weigh(heads.probabilities_of(scores, heads.allowed))

    return evaluated(attention, formula), cap, should


def right_scale(attention: Attention, config: LlamaConfig) -> str:
    """What scores should be scaled by, in words."""
    should = scale_words(config)
    return should if config.attention_multiplier else f"{should}, {attention.scale:.6g}"


@mistake(Attention, "scores scaled", kind=Kind.SOLVED)
def _(attention: Attention, at: FailingSite) -> Changed | None:
    """Scales scores by {0:.6g}; it should scale them by {1}."""
    times = fitted(
        _error_of_queries(attention, at, lambda s, by: capped(s * by, attention.cap)), 1e-2, 1e2
    )
    scale = times * attention.scale
    return replace(attention, scale=scale), scale, right_scale(attention, at.config)


@mistake(Attention, "hidden keys at a score too high", kind=Kind.SOLVED)
def _(attention: Attention, at: FailingSite) -> Iterator[Changed]:
    """Puts hidden keys at {0}, which other scores come near; it should put them at minus
    infinity."""
    if attention.mask is None or np.asarray(attention.mask).dtype != bool:
        return
    # The first queries are those that the most keys are hidden from.
    first = replace(attention, q=attention.q[:, :_FEW])
    scores, v, sinks = scores_of(first), values_of(first), sinks_of(first)
    theirs = wide(at.computed)[:, :_FEW]
    mask = np.asarray(attention.mask)[:, None, :_FEW]
    allowed, every = np.broadcast_to(mask, scores.shape), np.ones(scores.shape, bool)

    def error(size: float, added: bool) -> float:
        hidden = scores - size if added else -size
        y = softmax(np.where(allowed, scores, hidden), every, sinks) @ v
        return float(np.nansum(np.square(y.transpose(0, 2, 1, 3) - theirs)))

    for added in (False, True):
        size = fitted(partial(error, added=added), 1e-1, 1e3)
        said = f"their score less {size:.4g}" if added else f"a score of {-size:.4g}"
        yield evaluated(attention, lowered, -size, added), said


@mistake(Linear, "logits capped", kind=Kind.SOLVED, roles=("lm_head",))
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Caps logits y as {0:.4g} tanh(y / {0:.4g}), as Gemma 2 does; it should leave them as they
    are."""
    exact, theirs = at.bound(at.formats).exact, wide(at.computed)
    exact, theirs = exact[:, -_FEW:], theirs[:, -_FEW:]
    cap = fitted(lambda c: float(np.nansum(np.square(capped(exact, c) - theirs))), 1e-1, 1e3)
    return evaluated(linear, lambda n: Linear.formula(n).apply(partial(capped, cap=cap))), cap


@mistake(Linear, "another token's logits", roles=("lm_head",), kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Has the logits of token {0}; it should have those of the last, {1}."""
    # Where one token was kept: for each sequence the one whose logits these are.
    rows = at.recorded.arrays.get("model.norm")
    if at.computed.shape[1] != 1 or rows is None:
        return None
    rows = to_numpy(rows)
    exact = wide(rows) @ wide(linear.weight[:_FEW]).T
    error = np.sum(np.square(exact - wide(at.computed[..., :_FEW])), axis=-1)
    tokens = np.argmin(np.nan_to_num(error, nan=np.inf), axis=1)
    chosen = rows[np.arange(len(rows)), tokens][:, None]
    return replace(linear, x=chosen), listed(tokens.tolist(), 6), rows.shape[1] - 1
