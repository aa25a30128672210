"""Log-probabilities that are made of the right logits in a wrong way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.log_softmax import Choice, LogSum
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake, moved
from llama_layers.verify.mistakes.rounding import NARROW, in_each_narrow_format, narrowed
from llama_layers.verify.operations import Logprobs
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array, gamma, read_in
from llama_layers.verify.tracked import Tracked

_LN2, _LN10 = np.log(2.0), np.log(10.0)
# Where a number is this close to the middle between two of a format, relative to their distance,
# sums in another order may round it to either.
_MIDDLE = 1e-2
_EXACT = Rounding("float64", "float64")


@mistake(Logprobs, "temperature forgotten")
def _(op: Logprobs, at: FailingSite) -> Changed | None:
    """Does not divide the logits by the temperature, {0:g}; the trace says that it should."""
    if op.temperature == 1:
        return None
    return replace(op, temperature=1.0), op.temperature


@mistake(Logprobs, "temperature applied twice")
def _(op: Logprobs, at: FailingSite) -> Changed | None:
    """Divides the logits by the temperature, {0:g}, twice; it should divide them once."""
    if op.temperature == 1:
        return None
    return replace(op, temperature=op.temperature**2), op.temperature


@mistake(Logprobs, "logarithm to base 2")
def _(choice: Choice) -> Tracked:
    """Takes logarithms to the base 2; it should take natural ones."""
    return Logprobs.formula(choice) / _LN2


@mistake(Logprobs, "logarithm to base 10")
def _(choice: Choice) -> Tracked:
    """Takes logarithms to the base 10; it should take natural ones."""
    return Logprobs.formula(choice) / _LN10


@mistake(Logprobs, "negative log-likelihood")
def _(choice: Choice) -> Tracked:
    """The array has log-probabilities with the other sign, as a loss has; it should not."""
    return -Logprobs.formula(choice)


@mistake(Logprobs, "probabilities for log-probabilities")
def _(choice: Choice) -> Tracked:
    """The array is the softmax of the logits; it should be its logarithm."""
    return Logprobs.formula(choice).exp()


@mistake(Logprobs, "logits for log-probabilities")
def _(choice: Choice) -> Tracked:
    """The array has the logits of the tokens; it should have them less their log-sum-exp."""
    return choice.of(choice.logits)


@mistake(Logprobs, "logits less their maximum for log-probabilities")
def _(choice: Choice) -> Tracked:
    """The array has the logits less the largest of each token; it should have them less their
    log-sum-exp."""
    return choice.of(choice.logits - choice.logits.max())


@mistake(Logprobs, "tokens shifted by one")
def _(op: Logprobs, at: FailingSite) -> Iterator[Changed]:
    """{0}; it should have that of token s + 1, which the logits at position s predict."""
    if op.ids is None or at.recorded.input_ids is None or op.ids.shape[1] < 3:
        return
    ids = np.where(op.ids < 0, -1, at.recorded.input_ids[:, -op.ids.shape[1] :])
    yield (
        replace(op, ids=ids),
        "The array has at position s how likely the logits there make token s itself",
    )
    known = op.ids[..., None] >= 0
    yield (
        moved(replace(op, ids=ids), partial(_shifted, -1, wide(at.computed), known)),
        "The array has of each token s how likely the logits at its own position make it",
    )
    for step, said in (
        (1, "The array has at position s the log-probability of token s, predicted at s - 1"),
        (-1, "The array has at position s the log-probability of token s + 2"),
    ):
        yield moved(op, partial(_shifted, step, wide(at.computed), known)), said


def _shifted(
    step: int, theirs: Float64Array, known: np.ndarray, numbers: Float64Array
) -> Float64Array:
    """Move numbers along the tokens; where none is known, the port's own stands."""
    found = np.roll(numbers, step, axis=1)
    found[:, 0 if step > 0 else -1] = np.nan
    unknown = np.isnan(found)
    return np.where(unknown, theirs, np.where(known, found, np.nan))


@mistake(Logprobs, "log-probabilities summed")
def _(op: Logprobs, at: FailingSite) -> Iterator[Changed]:
    """The array has {0}; it should have the log-probability of each token."""
    if op.ids is None:
        return
    yield Computed(partial(_summed, op, op.ids >= 0)), "the sum over the tokens so far"
    yield Computed(partial(_summed, op, op.ids >= 0, total=True)), "the sum over all tokens"
    means = partial(_summed, op, op.ids >= 0, total=True, mean=True)
    yield Computed(means), "the mean over all tokens"


@mistake(Logprobs, "padding counted")
def _(op: Logprobs, at: FailingSite) -> Iterator[Changed]:
    """The array has {0}, and those of padding count in it; padding should not count."""
    given, keep = at.recorded.input_ids, at.recorded.keep
    if op.ids is None or given is None or keep is None:
        return
    ids = np.full_like(op.ids, -1)
    ids[:, :-1] = given[:, 1:]
    everything = replace(op, ids=ids)
    for total, mean, said in (
        (False, False, "the sum of the log-probabilities so far"),
        (True, False, "the sum of all log-probabilities"),
        (True, True, "the mean of all log-probabilities"),
    ):
        yield Computed(partial(_summed, everything, op.ids >= 0, total=total, mean=mean)), said


def _summed(
    op: Logprobs,
    known: np.ndarray,
    how: Rounding,
    *,
    total: bool = False,
    mean: bool = False,
) -> Bound:
    """The sums of what an operation gives, up to each token or of all tokens of a sequence."""
    right = op.bound(how)
    counts = ~np.isnan(right.exact)
    found = []
    for part in (right.exact, right.limit, right.usual):
        sums = np.cumsum(np.where(counts, part, 0.0), axis=1)
        if total:
            sums = np.broadcast_to(sums[:, -1:], sums.shape)
        if mean:
            sums = sums / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        found.append(sums)
    exact, *errors = found
    grown = gamma(exact.shape[1] + 1, how.sums.unit_roundoff)
    size = np.cumsum(np.where(counts, np.abs(right.exact), 0.0), axis=1)[:, -1:]
    if mean:
        size = size / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    judged = known[..., None]
    limits = [np.where(judged, e + grown * size, np.inf) for e in errors]
    return Bound(np.where(judged, exact, np.nan), *limits)


@mistake(Logprobs, "log-softmax over the wrong axis")
def _(op: Logprobs, at: FailingSite) -> Iterator[Changed]:
    """Normalises over {0}; it should normalise over the vocabulary."""
    batch, count, _ = op.logits.shape
    for axis, size, said in ((1, count, "the tokens"), (0, batch, "the sequences of the batch")):
        if size > 1:
            yield Computed(partial(_over, op, axis)), said


def _over(op: Logprobs, axis: int, how: Rounding) -> Bound:
    """The log-softmax over tokens or sequences, as that of transposed logits."""
    logits = wide(op.logits) / op.temperature
    rows = np.moveaxis(logits, axis, -1)  # [B or S, V, S or B]
    total = LogSum.of(Tracked(rows, np.zeros(()), np.zeros(()), how, how.sums))
    numbers = total.below(Tracked(rows, np.zeros(()), np.zeros(()), how, how.sums)).bound()
    parts = [np.moveaxis(part, -1, axis) for part in (numbers.exact, numbers.limit, numbers.usual)]
    if op.ids is None:
        return Bound(*parts)
    places = np.maximum(op.ids, 0)[..., None]
    exact, *limits = (np.take_along_axis(part, places, axis=-1) for part in parts)
    known = op.ids[..., None] >= 0
    return Bound(np.where(known, exact, np.nan), *(np.where(known, e, np.inf) for e in limits))


@in_each_narrow_format
def _head_in(narrow: str) -> None:
    @mistake(
        Logprobs,
        f"head in {narrow}",
        says=f"Rounds {{0}} to {narrow}; log-probabilities should be made of logits in float32.",
    )
    def _(op: Logprobs, at: FailingSite) -> Iterator[Changed]:
        if FLOATS[op.logits.dtype.name].precision <= FLOATS[narrow].precision:
            return
        yield replace(op, logits=narrowed(op.logits, narrow)), "the logits"
        states = at.array("model.norm")
        if at.formats.inputs is not None or states is None:  # the port's own logits are known
            return
        logits = narrowed(states, narrow) @ narrowed(to_numpy(at.model.weights.lm_head), narrow).T
        said = "states and weights before the head"
        yield replace(op, logits=logits), said
        yield replace(op, logits=narrowed(logits, narrow)), f"{said}, and its logits,"


@in_each_narrow_format
def _normaliser_in(narrow: str) -> None:
    @mistake(
        Logprobs,
        f"log-sum-exp rounded to {narrow}",
        kind=Kind.ROUNDING,
        says=f"Rounds the log-sum-exp of each token to {narrow} before it subtracts it; it should "
        "keep it in float32.",
    )
    def _(op: Logprobs, at: FailingSite) -> Changed | None:
        if op.ids is None:
            return None
        logits = op.evaluate(lambda choice: choice.of(choice.logits), _EXACT).exact
        total = logits - op.bound(_EXACT).exact
        total = _rounded(total, logits - wide(at.computed), narrow)
        return Computed(
            lambda how: (_known(logits, how) - _known(total, how)).bound().only(~np.isnan(logits))
        )


def _logarithm_in(form: str) -> None:
    @mistake(
        Logprobs,
        f"logarithm of probabilities in {form}",
        kind=Kind.ROUNDING,
        says=f"Takes the logarithm of probabilities in {form}; it should subtract the log-sum-exp "
        "from the logits, in float32.",
    )
    def _(op: Logprobs, at: FailingSite) -> Changed | None:
        theirs = wide(at.computed)
        if form == "float32" and not np.isneginf(theirs).any():
            return None  # as good as any other way, where none underflows
        p = _rounded(np.exp(op.bound(_EXACT).exact), np.exp(theirs), form)
        return Computed(lambda how: _logarithm(_known(p, how)))


for _form in (*NARROW, "float32"):
    _logarithm_in(_form)


def _logarithm(p: Tracked) -> Bound:
    """Of exact numbers; that of 0 is minus infinity, and nothing else."""
    bound = p.apply(np.log, slope=0.0).bound().only(~np.isnan(p.exact))
    limits = (np.where(p.exact == 0, 0.0, limit) for limit in (bound.limit, bound.usual))
    return Bound(bound.exact, *limits)


def _known(numbers: Float64Array, how: Rounding) -> Tracked:
    return Tracked(numbers, np.zeros(()), np.zeros(()), how, how.sums)


def _rounded(exact: Float64Array, theirs: Float64Array, narrow: str) -> Float64Array:
    """Numbers in a narrow format; where both neighbours are as near, that which the port has."""
    form = FLOATS[narrow]
    window = _MIDDLE * form.unit_roundoff * np.abs(exact)
    low, high = (read_in(exact + by, form) for by in (-window, window))
    return np.where(np.abs(theirs - low) <= np.abs(theirs - high), low, high)
