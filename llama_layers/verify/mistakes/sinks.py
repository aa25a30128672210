"""Mistakes in what joins the scores of a head in the softmax, and weighs no value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.registry import Changed, evaluated, mistake
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


@mistake(WITH_SINKS, "sink in the numerator")
def _(operation: WITH_SINKS, at: FailingSite) -> Changed | None:
    """Gives the first key the weight of the sink, too; it weighs no value."""
    return None if operation.sinks is None else evaluated(operation, _to_first)


def _to_first(heads: Heads) -> Tracked:
    weights = heads.probabilities()
    left = -(weights.sum() - 1.0)
    first = np.arange(weights.shape[-1]) == 0
    return heads.weigh(weights + left.where(first, 0.0))
