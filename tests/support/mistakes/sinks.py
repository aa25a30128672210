"""Mistakes with sinks."""

from __future__ import annotations

import numpy as np

from tests.support.mistakes.mistake import ATTENTION, Mistake


def _with(change=lambda sinks: sinks, weigh=lambda weights, sink: weights):
    """Attention whose sinks and weights are changed."""

    def wrong(p):
        q, k, v = (array.astype(np.float64) for array in p.qkv)
        k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        scores = np.einsum("bshd,bthd->bhst", q, k) * p.scale
        scores = np.where(p.allowed, scores, -np.inf)
        sinks = change(p.sinks.astype(np.float64))
        e, sink = np.exp(scores), np.exp(sinks)[None, :, None, None]
        total = e.sum(axis=-1, keepdims=True) + sink
        return np.einsum("bhst,bthd->bshd", weigh(e / total, sink / total), v)

    return wrong


def _in_the_numerator(weights, sink):
    weights = weights.copy()
    weights[..., :1] += sink
    return weights


MISTAKES = [
    Mistake("sinks left out", ATTENTION, _with(lambda s: s - np.inf), "sinks"),
    Mistake("sinks scaled", ATTENTION, _with(lambda s: s / np.sqrt(8)), "sinks"),
    Mistake("sinks of other heads", ATTENTION, _with(lambda s: s[::-1]), "sinks"),
    Mistake("sinks of other numbers", ATTENTION, _with(lambda s: -s), "sinks"),
    Mistake("sinks of other numbers", ATTENTION, _with(np.exp), "sinks"),
    Mistake("sinks of other numbers", ATTENTION, _with(lambda s: np.roll(s, 1)), "sinks"),
    Mistake("sink in the numerator", ATTENTION, _with(weigh=_in_the_numerator), "sinks"),
]
