"""Mistakes in attention that is computed a block of keys at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.attention import Heads
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.across_heads import joined
from llama_layers.verify.mistakes.attention_arrays import scores_of, sinks_of
from llama_layers.verify.mistakes.masks import MASKED, masked, seen, window_of
from llama_layers.verify.mistakes.near import other_inputs, weighed
from llama_layers.verify.mistakes.predicted import rounded
from llama_layers.verify.mistakes.registry import Changed, Kind, evaluated, mistake
from llama_layers.verify.mistakes.rounding import in_each_narrow_format
from llama_layers.verify.mistakes.weighing import WEIGHING, exponentials, hidden_at, total
from llama_layers.verify.operations import Attention
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

# Keys that kernels compute with at a time.
BLOCKS = (4, 8, 16, 32, 64, 128, 256)
# Parts that the keys are split into for as many workers.
_SPLITS = (2, 3, 4, 6, 8)


def _blocks(at: FailingSite) -> Iterator[int]:
    """The sizes of blocks of which there are several."""
    yield from (block for block in BLOCKS if block < at.recorded.count)


def _largest_so_far(scores: Tracked, block: int) -> Tracked:
    """The largest score of each row up to the end of each key's block."""
    keys = np.arange(scores.shape[-1])
    ends = np.minimum((keys // block + 1) * block, len(keys)) - 1
    exact = np.maximum.accumulate(scores.exact, axis=-1)[..., ends]
    exact = np.where(np.isfinite(exact), exact, 0.0)
    errors = scores.max().errors(lambda e: np.broadcast_to(e, exact.shape))
    return scores.with_errors(errors, exact)


def _not_rescaled(heads: Heads, block: int, values: bool, sums: bool) -> Tracked:
    """Attention of which the sum of values or of exponentials is rescaled, or none is."""
    scores = hidden_at(heads, -np.inf)
    late = (scores - _largest_so_far(scores, block)).exp()
    right = (scores - scores.max()).exp()
    return heads.weigh((right if values else late) / (right if sums else late).sum())


@mistake(WEIGHING, "online softmax without rescaling")
def _(operation: WEIGHING, at: FailingSite) -> Iterator[Changed]:
    """Does not rescale {0} where a block of {1} keys has a larger score than those before; it
    should multiply by exp(old maximum - new maximum)."""
    for block in _blocks(at):
        for values, sums, said in (
            (False, False, "its sums"),
            (False, True, "the sum of values"),
            (True, False, "the sum of exponentials"),
        ):
            if found := weighed(operation, at, _not_rescaled, block, values, sums):
                yield found, said, block


def _averaged(heads: Heads, block: int, empty: bool) -> Tracked:
    """The mean of what each block of keys gives by itself."""
    weights = exponentials(heads)
    count = weights.shape[-1]
    starts = range(0, count, block)
    parts = [weights[..., start : start + block] for start in starts]
    # Of keys that are hidden the exponentials are 0: what is divided by 1 stays so.
    totals = [part.sum() for part in parts]
    sees = [total.exact > 0 for total in totals]
    quotients = [p / t.where(s, 1.0) for p, t, s in zip(parts, totals, sees, strict=True)]
    blocks = float(len(parts)) if empty else np.sum(sees, axis=0, dtype=np.float64)
    return heads.weigh(joined(quotients, -1) / np.maximum(blocks, 1.0))


@mistake(WEIGHING, "blocks of keys averaged")
def _(operation: WEIGHING, at: FailingSite) -> Iterator[Changed]:
    """Gives the mean of what each block of {0} keys gives; it should weigh the blocks with the
    sums of their exponentials."""
    splits = (-(-at.recorded.count // parts) for parts in _SPLITS)
    for block in dict.fromkeys((*_blocks(at), *splits)):
        for empty in (False, True):
            if found := weighed(operation, at, _averaged, block, empty):
                yield found, block


@mistake(MASKED, "causal mask by the block")
def _(operation: MASKED, at: FailingSite) -> Iterator[Changed]:
    """Lets a token see {0} of {1} tokens; it should let it see itself and earlier ones."""
    queries, keys = np.indices((at.recorded.count,) * 2)
    whole = seen(at, None, window_of(at), padding=False)
    for block in _blocks(at):
        for allowed, said in (
            (keys // block <= queries // block, "all of its block"),
            (keys // block < queries // block, "the blocks before its own only"),
        ):
            mask = np.broadcast_to(whole & allowed, np.asarray(operation.mask).shape)
            if other_inputs(operation, at, mask=mask):
                yield masked(operation, mask), said, block


@mistake(MASKED, "last keys left out")
def _(operation: MASKED, at: FailingSite) -> Iterator[Changed]:
    """Leaves out the keys after the last whole block of {0}; it should see these, too."""
    count = at.recorded.count
    for block in _blocks(at):
        if count % block:
            mask = np.asarray(operation.mask) & (np.arange(count) < count // block * block)
            if other_inputs(operation, at, mask=mask):
                yield masked(operation, mask), block


def _with_zeros(heads: Heads, number: Float64Array) -> Tracked:
    """Attention with keys and values of zeros beside its own, a number for each query."""
    scores = hidden_at(heads, -np.inf)
    largest = scores.max()
    weights = (scores - largest).exp()
    counted = total(heads, weights, largest) + (-largest).exp() * number[:, None]
    return heads.weigh(weights / counted)


@mistake(Attention, "empty keys counted", kind=Kind.SOLVED)
def _(attention: Attention, at: FailingSite) -> Iterator[Changed]:
    """Counts {0} of zeros, too; it should hide keys that no token has."""
    # Each adds exp(0) to the sum of exponentials: their number is by how much that is larger.
    numbers = _zeros_counted(attention, at)
    places = np.arange(at.recorded.count)
    constant = np.full(len(places), np.round(np.median(numbers)))
    capacity = np.round(np.median(numbers + places + 1))
    cases: list[tuple[Float64Array, str]] = [(constant, f"{constant[0]:.0f} keys")]
    if capacity > len(places) - 1:
        empty = np.maximum(capacity - 1 - places, 0.0)
        cases.append((empty, f"the empty slots of a cache of {capacity:.0f}"))
    for block in (2, *BLOCKS):
        cases.append(
            (np.asarray(-(places + 1.0) % block), f"keys up to the next multiple of {block}")
        )
    wrong = (at.ratio > 1).any(axis=(0, 2, 3))
    for number, said in cases:
        near = np.abs(numbers - number)[wrong] <= 0.25 * np.maximum(number[wrong], 1.0)
        if number.any() and np.mean(near) > 0.75:
            yield evaluated(attention, _with_zeros, number), said


def _zeros_counted(attention: Attention, at: FailingSite) -> Float64Array:
    """For each query, how many scores of 0 the sum of exponentials would have to have besides."""
    exact, theirs = at.bound(at.formats).exact, wide(at.computed)
    scores = scores_of(attention)
    allowed = np.broadcast_to(np.asarray(attention.mask)[:, None], scores.shape)
    with np.errstate(all="ignore"):
        powers = np.exp(np.where(allowed, scores, -np.inf))
        every = (powers.sum(axis=-1) + np.exp(sinks_of(attention)[..., 0])).swapaxes(1, 2)
        kept = np.sum(exact * theirs, axis=-1) / np.sum(np.square(exact), axis=-1)
        found = np.nanmedian((1 / kept - 1) * every, axis=(0, 2))
    return np.nan_to_num(found, posinf=0.0, neginf=0.0)


@in_each_narrow_format
def _probabilities_in(narrow: str) -> None:
    form = FLOATS[narrow]

    def normalised(heads: Heads) -> Tracked:
        return heads.weigh(rounded(heads.probabilities(), form))

    def unnormalised(heads: Heads, same: bool) -> Tracked:
        weights = exponentials(heads)
        narrower = rounded(weights, form)
        assert heads.v is not None
        return heads.weighted_sum(narrower) / (narrower if same else weights).sum()

    @mistake(
        Attention,
        f"probabilities rounded to {narrow}",
        kind=Kind.ROUNDING,
        says=f"Rounds {{0}} to {narrow} before it weighs the values; it should keep float32.",
    )
    def _(attention: Attention, at: FailingSite) -> Iterator[Changed]:
        if found := weighed(attention, at, normalised):
            yield found, "probabilities"
        for same in (False, True):
            if found := weighed(attention, at, unnormalised, same):
                yield found, "exponentials"
