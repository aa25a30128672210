"""Log-probabilities of other logits: one number is found from the port's own array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.model.logprobs import log_softmax
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.fitted import fitted
from llama_layers.verify.mistakes.registry import Changed, mistake, moved
from llama_layers.verify.operations import Logprobs
from llama_layers.verify.roundoff import Float64Array

# Fewer tokens than these tell nothing of a number that is fitted to them.
_FEWEST = 3
# Tokens that numbers are fitted to, those with the largest errors; and that they are counted over.
_FEW, _MANY = 8, 256
# Squares of errors this many times the least are about as small.
_AS_WELL = 1.5
# Numbers of kept tokens that are tried.
_TRIED = 8


@dataclass(frozen=True, eq=False)
class _Rows:
    """Tokens whose log-probabilities are wrong, those with the largest errors first."""

    logits: Float64Array  # [N, V]
    chosen: Float64Array  # the logit of the token in each row
    theirs: Float64Array  # the port's log-probability

    @classmethod
    def of(cls, op: Logprobs, at: FailingSite) -> _Rows | None:
        """The wrong tokens; None if they are too few."""
        right, computed = at.bound(at.formats), wide(at.computed)
        flat = wide(op.logits).reshape(-1, op.logits.shape[-1])
        exact, theirs = (y.reshape(len(flat), -1) for y in (right.exact, computed))
        ids = flat.argmax(axis=1) if op.ids is None else np.maximum(op.ids.reshape(-1), 0)
        places = ids[:, None] if op.ids is None else np.zeros((len(ids), 1), int)
        error = np.abs(np.take_along_axis(theirs - exact, places, axis=1))[:, 0]
        wrong = right.usual_ratio(at.computed).reshape(len(flat), -1).max(axis=1) > 1
        rows = np.flatnonzero(wrong & np.isfinite(error))
        if len(rows) < _FEWEST:
            return None
        rows = rows[np.argsort(-error[rows], kind="stable")][:_MANY]
        chosen = flat[rows, ids[rows]] / op.temperature
        own = np.take_along_axis(theirs, places, axis=1)[rows, 0]
        return cls(flat[rows] / op.temperature, chosen, own)

    @property
    def mass(self) -> Float64Array:
        """The sum of exponentials that the port divides by, over that of the largest."""
        return np.exp(self.chosen - self.theirs - self.logits.max(axis=1))

    def sums(self) -> Float64Array:
        """The sums of the largest exponentials, over the largest: 1, 2 and so on of them."""
        below = np.sort(self.logits, axis=1)[:, ::-1] - self.logits.max(axis=1, keepdims=True)
        return np.cumsum(np.exp(below), axis=1)


@mistake(Logprobs, "another temperature")
def _(op: Logprobs, at: FailingSite) -> Changed | None:
    """Divides the logits by a temperature of {0:.4g}; it should be {1:.4g}. Where {0:.4g} is meant,
    the trace's metadata should say "temperature"."""
    if (rows := _Rows.of(op, at)) is None:
        return None
    logits, chosen, theirs = (y[:_FEW] for y in (rows.logits, rows.chosen, rows.theirs))

    def error(relative: float) -> float:
        a = logits / relative
        total = a.max(axis=1)
        total = total + np.log(np.exp(a - total[:, None]).sum(axis=1))
        return float(np.sum(np.square(chosen / relative - total - theirs)))

    temperature = op.temperature * _simple(error, fitted(error, 0.02, 50.0))
    return replace(op, temperature=temperature), temperature, op.temperature


@mistake(Logprobs, "renormalised over the top k")
def _(op: Logprobs, at: FailingSite) -> Iterator[Changed]:
    """Normalises over the {0} likeliest tokens only; it should normalise over the whole
    vocabulary."""
    if (rows := _Rows.of(op, at)) is None:
        return
    left = np.square(np.log(rows.sums()) - np.log(rows.mass)[:, None]).sum(axis=0)
    least, most = _ranks(op, at)
    for k in least + np.argsort(left[least - 1 : most - 1], kind="stable")[:_TRIED]:
        yield replace(op, allowed=_largest(op.logits, k)), k


def _ranks(op: Logprobs, at: FailingSite) -> tuple[int, int]:
    """The rank of the least likely token that the port has a number for, and of the likeliest
    that it has none for."""
    size = op.logits.shape[-1]
    logits, theirs = wide(op.logits).reshape(-1, size), wide(at.computed)
    if op.ids is None:
        return 1, size
    ids, theirs = op.ids.reshape(-1), theirs.reshape(-1)
    ranks = 1 + (logits > np.take_along_axis(logits, np.maximum(ids, 0)[:, None], axis=1)).sum(1)
    has = ranks[(ids >= 0) & np.isfinite(theirs)]
    lacks = ranks[(ids >= 0) & np.isneginf(theirs)]
    return int(has.max(initial=1)), int(lacks.min(initial=size))


@mistake(Logprobs, "renormalised over the top p")
def _(op: Logprobs, at: FailingSite) -> Iterator[Changed]:
    """Normalises over the likeliest tokens, of {0:.4g} of the probability, only; it should
    normalise over the whole vocabulary."""
    if (rows := _Rows.of(op, at)) is None:
        return
    sums = rows.sums()
    shares = sums / sums[:, -1:]
    kept = np.argmin(np.abs(sums - rows.mass[:, None]), axis=1)
    each = np.arange(len(kept))
    low = float(np.where(kept > 0, shares[each, kept - 1], 0.0).max())
    high = float(shares[each, kept].min())
    if low < high:
        p = _shortest(low, high)
        yield replace(op, allowed=_likeliest(wide(op.logits) / op.temperature, p)), p


@mistake(Logprobs, "logits capped before the log-softmax")
def _(op: Logprobs, at: FailingSite) -> Changed | None:
    """Caps logits y as {0:.4g} tanh(y / {0:.4g}) before the log-softmax, as Gemma 2 does; it should
    leave them as they are."""
    if (rows := _Rows.of(op, at)) is None:
        return None
    logits, chosen, theirs = (y[:_FEW] for y in (rows.logits, rows.chosen, rows.theirs))

    def error(cap: float) -> float:
        a = cap * np.tanh(logits / cap)
        total = np.log(np.exp(a - a.max(axis=1, keepdims=True)).sum(axis=1)) + a.max(axis=1)
        return float(np.sum(np.square(cap * np.tanh(chosen / cap) - total - theirs)))

    cap = _simple(error, fitted(error, 1.0, 200.0))
    return replace(op, logits=cap * np.tanh(wide(op.logits) / cap)), cap


@mistake(Logprobs, "padding of the vocabulary counted")
def _(op: Logprobs, at: FailingSite) -> Changed | None:
    """Counts {0} logits of 0 that belong to no token in the normalisation; it should leave rows of
    padding in the head out."""
    if (rows := _Rows.of(op, at)) is None or op.temperature != 1:
        return None
    extra = (rows.mass - rows.sums()[:, -1]) * np.exp(rows.logits.max(axis=1))
    count = round(float(np.median(extra)))
    if not 1 <= count < op.logits.shape[-1]:
        return None
    zeros = np.zeros((*op.logits.shape[:-1], count), op.logits.dtype)
    longer = replace(op, logits=np.concatenate([op.logits, zeros], axis=-1))
    return moved(longer, lambda array: array[..., : op.logits.shape[-1]]), count


def _simple(error: Callable[[float], float], number: float) -> float:
    """The number of the fewest digits that fits about as well: people choose 0.7."""
    most = _AS_WELL * error(number)
    short = (float(f"{number:.{digits}g}") for digits in range(1, 6))
    return next((found for found in short if error(found) <= most), number)


def _largest(logits: np.ndarray, k: int) -> NDArray[np.bool_]:
    """Which logits of each token are among the k largest."""
    logits = wide(logits)
    return np.asarray(logits >= np.partition(logits, -k, axis=-1)[..., -k, None])


def _likeliest(logits: Float64Array, p: float) -> NDArray[np.bool_]:
    """Which tokens are among the likeliest, that together have a probability of p or more."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    probabilities = np.exp(np.take_along_axis(np.asarray(log_softmax(np, logits)), order, axis=-1))
    before = np.cumsum(probabilities, axis=-1) - probabilities
    allowed = np.empty(logits.shape, bool)
    np.put_along_axis(allowed, order, before < p, axis=-1)
    return allowed


def _shortest(low: float, high: float) -> float:
    """The number of the fewest digits between two."""
    for digits in range(1, 17):
        number = round((low + high) / 2, digits)
        if low < number <= high:
            return number
    return high
