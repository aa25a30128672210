"""Sites that can be solved for once a later one is: values, a gate's few wrong channels, and up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.layers.mlp import GATES
from llama_layers.layers.sites import Site
from llama_layers.verify.build import operation_of
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.gap_trial import Trial
from llama_layers.verify.mistakes.attention_arrays import scores_of, sinks_of, softmax
from llama_layers.verify.operations import Attention, Gate, Linear
from llama_layers.verify.roundoff import Float64Array

# The share of the wrong outputs' dimensions that wrong channels may span, to be told from others.
_SPAN = 0.75
# What is at most this many times the usual errors is taken for noise.
_NOISE = 8.0
# Singular values below that share of the largest tell nothing.
_LEAST = 1e-9


def inner(trial: Trial, later: FailingSite) -> Iterator[FailingSite]:
    """The sites that a later one is computed from, where they follow from it."""
    operation = later.operation
    if isinstance(operation, Attention):
        yield from _values(trial, later, operation)
    if isinstance(operation, Linear) and later.site.role == "mlp.down_proj":
        yield from _channels(trial, later, operation)


def _place(trial: Trial, name: str) -> Site | None:
    return next((place for place in trial.whole.gap.sites if place.name == name), None)


def _failing(
    trial: Trial, place: Site, array: Float64Array, unsure: Float64Array
) -> FailingSite | None:
    known = trial.whole.before([place.name])
    operation = operation_of(place, place.routes[-1], known, trial.whole.model)
    failing = trial.failing(place, operation, trial.whole, known)
    shape = failing.computed.shape
    array = np.where(np.abs(array) <= 4 * unsure, 0.0, array)
    return replace(failing, computed=array.reshape(shape), unsure=unsure.reshape(shape))


def _values(trial: Trial, later: FailingSite, attention: Attention) -> Iterator[FailingSite]:
    """The values that attention must have weighed, if it weighed as it should."""
    place = _place(trial, later.site.routes[-1][-1])
    assert later.unsure is not None
    if place is None or place.operation != "linear" or not np.isfinite(later.unsure).all():
        return
    scores = scores_of(attention)
    allowed = np.broadcast_to(np.asarray(attention.mask)[:, None], scores.shape)
    weights = softmax(scores, allowed, sinks_of(attention))
    heads, of = weights.shape[1], attention.v.shape[2]
    batch, count, _, width = later.computed.shape

    def stacked(array: Float64Array) -> Float64Array:
        """Heads that read the same values one below the other, [B, kv, group x S, D]."""
        array = wide(array).transpose(0, 2, 1, 3)
        return array.reshape(batch, of, heads // of * count, width)

    rows = weights.reshape(batch, of, heads // of * count, -1)
    back = np.linalg.pinv(rows, rcond=_LEAST)
    found = back @ stacked(later.computed)
    unsure = np.sqrt(np.square(back) @ np.square(stacked(later.unsure)))
    if failing := _failing(trial, place, found.transpose(0, 2, 1, 3), unsure.transpose(0, 2, 1, 3)):
        yield failing


def _channels(trial: Trial, later: FailingSite, down: Linear) -> Iterator[FailingSite]:
    """The channels of a gate that are wrong, if they are few, and those of up."""
    place = _place(trial, later.site.routes[-1][0])
    assert later.unsure is not None
    if place is None or place.operation != "gate":
        return
    error = wide(later.computed) - later.operation.bound(later.formats).exact
    error, unsure = (y.reshape(-1, y.shape[-1]) for y in (error, later.unsure))
    known = np.isfinite(unsure).all(axis=1) & np.isfinite(error).all(axis=1)
    if np.count_nonzero(known) < 2:
        return
    noise = _NOISE * float(np.median(unsure[known]))
    _, sizes, directions = np.linalg.svd(error[known], full_matrices=False)
    rank = int(np.count_nonzero(sizes > noise * (sum(error[known].shape) ** 0.5)))
    weight = wide(down.weight)
    if not 0 < rank <= _SPAN * min(error[known].shape):
        return
    # Columns of the matrix that lie in what the errors span.
    inside = np.sum(np.square(directions[:rank] @ weight), axis=0)
    outside = 1 - inside / np.maximum(np.sum(np.square(weight), axis=0), 1e-300)
    channels = np.flatnonzero(outside < 1e-4)
    if not 0 < len(channels) <= _SPAN * len(weight):
        return
    back = np.linalg.pinv(weight[:, channels], rcond=_LEAST)
    more = error @ back.T
    if np.abs(more @ weight[:, channels].T - error)[known].max() > noise:
        return
    array = wide(trial.whole.computed(place)).reshape(len(error), -1)
    off = np.zeros(array.shape)
    off[:, channels] = np.sqrt(np.square(unsure) @ np.square(back.T))
    off[~known] = np.inf
    array = array.copy()
    array[np.ix_(known, channels)] += more[known]
    if (gate := _failing(trial, place, array, off)) is None:
        return
    yield gate
    up = _place(trial, place.routes[-1][1])
    if up is not None and isinstance(gate.operation, Gate):
        ones = np.ones(gate.computed.shape)
        act = np.asarray(GATES[gate.operation.act](wide(gate.operation.gate), ones))
        with np.errstate(all="ignore"):
            array, off = wide(gate.computed) / act, off.reshape(act.shape) / np.abs(act)
        right = wide(gate.operation.up)
        sure = np.isfinite(array) & np.isfinite(off) & (off <= np.abs(right).max())
        array, off = np.where(sure, array, right), np.where(sure, off, np.inf)
        if (failing := _failing(trial, up, array, off)) is not None:
            yield failing
