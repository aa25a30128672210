"""Mistakes in what joins the scores of a head in the softmax, and weighs no value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.attention_arrays import scores_of, softmax, values_of
from llama_layers.verify.mistakes.registry import Changed, Kind, evaluated, mistake
from llama_layers.verify.operations import Attention, Heads, Probabilities, Softmax
from llama_layers.verify.tracked import Tracked

WITH_SINKS = Attention | Probabilities | Softmax


@mistake(WITH_SINKS, "sinks left out")
def _(operation: WITH_SINKS, at: FailingSite) -> Changed | None:
    """Normalises over the keys; it should add the exponential of the head's sink to the sum."""
    return None if operation.sinks is None else replace(operation, sinks=None)


@mistake(WITH_SINKS, "sinks scaled")
def _(operation: WITH_SINKS, at: FailingSite) -> Iterator[Changed]:
    """Multiplies sinks by the {0}; they join the scores as they are."""
    if operation.sinks is None:
        return
    scale = at.config.attention_scale
    for factor, said in ((scale, "scale of scores"), (1 / scale, "inverse of the scale of scores")):
        yield replace(operation, sinks=operation.sinks * factor), said


@mistake(WITH_SINKS, "sinks of other heads")
def _(operation: WITH_SINKS, at: FailingSite) -> Iterator[Changed]:
    """Gives heads the sinks of others; that of query head h is number h."""
    if (sinks := operation.sinks) is None:
        return
    split = np.arange(len(sinks)).reshape(at.config.num_key_value_heads, -1)
    others = (split.T.ravel(), split[:, ::-1].ravel(), np.arange(len(sinks))[::-1])
    for order in (*others, np.repeat(split[:, 0], split.shape[1])):
        yield replace(operation, sinks=sinks[order])


@mistake(Attention, "sinks of other numbers", kind=Kind.SOLVED)
def _(attention: Attention, at: FailingSite) -> Changed | None:
    """Has a sink of {0:.4g} for head {1}; it should have {2:.4g}."""
    theirs = wide(at.computed).transpose(0, 2, 1, 3)
    if attention.sinks is None or not np.isfinite(theirs).all():
        return None
    # Without a sink the sum is 1: what one adds to it is in proportion to what is missing.
    scores = scores_of(attention)
    allowed = np.broadcast_to(np.asarray(attention.mask)[:, None], scores.shape)
    missing = softmax(scores, allowed) @ values_of(attention) - theirs
    largest = np.where(allowed, scores, -np.inf).max(axis=-1, keepdims=True)
    total = np.sum(np.exp(np.where(allowed, scores, -np.inf) - largest), axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        share = theirs * np.exp(-largest) / total
        found = np.log(np.sum(missing * share, axis=(0, 2, 3)) / np.sum(share**2, axis=(0, 2, 3)))
    wrong = (at.ratio > 1).any(axis=(0, 1, 3)) & np.isfinite(found)
    if not wrong.any():
        return None
    head, own = int(np.argmax(wrong)), wide(attention.sinks)
    changed = replace(attention, sinks=np.where(wrong, found, own))
    return changed, found[head], head, own[head]


@mistake(WITH_SINKS, "sink in the numerator")
def _(operation: WITH_SINKS, at: FailingSite) -> Changed | None:
    """Gives the first key the weight of the sink, too; it weighs no value."""
    return None if operation.sinks is None else evaluated(operation, _to_first)


def _to_first(heads: Heads) -> Tracked:
    weights = heads.probabilities()
    left = -(weights.sum() - 1.0)
    first = np.arange(weights.shape[-1]) == 0
    return heads.weigh(weights + left.where(first, 0.0))
