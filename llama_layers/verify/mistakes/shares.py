"""A part of the channels taken for all: tiles and shares of sums, and of means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.near import other_weight, worst_of_product
from llama_layers.verify.mistakes.registry import Changed, by_token, mistake
from llama_layers.verify.operations import Linear, Norm
from llama_layers.verify.tracked import Tracked

_TILES = (4, 8, 16, 32, 64, 128, 256)
_RANKS = (2, 4, 8, 16)
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def _ranges(width: int, at: FailingSite) -> Iterator[tuple[int, int]]:
    """The parts of a sum that kernels and ranks compute by themselves."""
    found = dict.fromkeys(_of_ranks(width, at))
    for ranks in _RANKS:
        if width % ranks == 0:
            share = width // ranks
            found.update({(i * share, (i + 1) * share): None for i in range(ranks)})
    for tile in _TILES:
        if tile < width:
            starts = range(0, width, tile)
            found.update({(start, min(start + tile, width)): None for start in starts})
    yield from found


def _of_ranks(width: int, at: FailingSite) -> Iterator[tuple[int, int]]:
    """What each rank has of a sum, if the trace is one of ranks; and all but the first and last."""
    (source, *_), *_ = at.site.routes
    places = [[p for p in own if p is not None] for own in at.recorded.places.get(source, ())]
    if owned := [own for own in places if own]:
        unit = width // (1 + max(map(max, owned)))
        yield from ((unit * own[0], unit * (own[-1] + 1)) for own in owned)
    if len(owned) > 1:
        yield from ((unit * (owned[0][-1] + 1), width), (0, unit * owned[-1][0]))


@mistake(Linear, "a part of the sum left out")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Leaves input channels {0} out of its sums{1}; it should add them, too."""
    yield from _parts(linear, at, 0.0)


@mistake(Linear, "a part of the sum added twice")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Adds input channels {0} twice{1}; it should add them once."""
    yield from _parts(linear, at, 2.0)


def _parts(linear: Linear, at: FailingSite, factor: float) -> Iterator[Changed]:
    """Products in which a range of the input counts otherwise: that which fits best."""
    width = linear.weight.shape[1]
    ranges = np.array([*_ranges(width, at)])
    if not len(ranges):
        return
    wrong = np.flatnonzero((at.ratio > 1).any(axis=(0, 1)))
    if not len(wrong):
        yield _changed(linear, ranges[-1], factor, np.arange(len(linear.weight)))
        return
    tokens, outputs = worst_of_product(at)
    outputs = outputs[np.isin(outputs, wrong)]
    terms = wide(linear.x[:, tokens])[:, :, None] * wide(linear.weight[outputs])
    sums = np.cumsum(terms, axis=-1)
    sums = np.concatenate([np.zeros_like(sums[..., :1]), sums], axis=-1)
    places = np.ix_(np.arange(len(linear.x)), tokens, outputs)
    error = wide(at.computed[places]) - at.bound(at.formats).exact[places]
    error[~(at.ratio[places] > 1).any(axis=-1)] = 0
    parts = sums[..., ranges[:, 1]] - sums[..., ranges[:, 0]]
    left = np.sum(np.square(error[..., None] - (factor - 1) * parts), axis=(0, 1, 2))
    best = int(np.argmin(np.nan_to_num(left, nan=np.inf)))
    if left[best] < 0.25 * np.sum(np.square(error)):
        yield _changed(linear, ranges[best], factor, wrong)


def _changed(linear: Linear, part: np.ndarray, factor: float, outputs: np.ndarray) -> Changed:
    """A product in which a range of the input counts otherwise in some outputs, one or a run."""
    start, stop = (int(i) for i in part)
    said = f"{start}..{stop - 1}"
    first, last = int(outputs[0]), int(outputs[-1])
    if len(outputs) * 8 > 7 * len(linear.weight):
        x = wide(linear.x)
        x[..., start:stop] *= factor
        return replace(linear, x=x), said, ""
    weight = wide(linear.weight)
    weight[first : last + 1, start:stop] *= factor
    return replace(linear, weight=weight), said, f" of outputs {first}..{last}"


@mistake(Linear, "input channels in another order")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies input channels {0}; it should multiply them in their order."""
    width = linear.weight.shape[1]
    places = np.arange(width)
    orders = {
        "in reverse order": places[::-1],
        "of which each is the one before": np.roll(places, 1),
        "of which each is the one after": np.roll(places, -1),
    }
    if width % 2 == 0:
        halves = places.reshape(2, -1)
        orders["of which the halves are swapped"] = halves[::-1].ravel()
        orders["of which even and odd ones are apart"] = halves.reshape(-1, 2).T.ravel()
        orders["of which the halves alternate"] = halves.T.ravel()
    if width % 8 == 0:
        eights = places.reshape(-1, 8)
        orders["in AWQ's order of eight"] = eights[:, list(_AWQ)].ravel()
        orders["in AWQ's order of eight, undone"] = eights[:, np.argsort(_AWQ)].ravel()
        orders["in reverse order by eight"] = eights[:, ::-1].ravel()
    for said, order in orders.items():
        changed = replace(linear, x=linear.x[..., order])
        if other_weight(changed, at):
            yield changed, said


@mistake(Linear, "weights off by one element")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Reads the matrix from one number too {0}; it should read it from its first."""
    flat = linear.weight.ravel()
    for step, said in ((1, "early"), (-1, "late")):
        changed = replace(linear, weight=np.roll(flat, step).reshape(linear.weight.shape))
        if other_weight(changed, at):
            yield changed, said


@mistake(Linear, "norm's weight counted otherwise")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Multiplies inputs that are scaled with the norm's weight {0}; it should scale them once."""
    weight = _norm_before(at)
    if weight is None or weight.shape[0] != linear.x.shape[-1]:
        return
    x = wide(linear.x)
    with np.errstate(all="ignore"):
        for scaled, said in ((x * weight, "twice"), (x / weight, "not at all")):
            changed = replace(linear, x=np.nan_to_num(scaled))
            if other_weight(changed, at):
                yield changed, said


def _norm_before(at: FailingSite) -> np.ndarray | None:
    """The weight of the norm that gives the site's input."""
    weights = at.model.weights
    if at.site.role == "lm_head":
        return wide(weights.norm)
    before = at.input_site(0)
    if before is None or before.layer is None or before.operation != "norm":
        return None
    norm = weights.layers[before.layer].norms().get(before.role)
    return None if norm is None else wide(norm)


@mistake(Norm, "normalised over a share of the channels")
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Takes one mean square for each of {0} shares of the channels; it should take one for all."""
    width, dim = norm.x.shape[-1], at.config.head_dim
    for shares in dict.fromkeys((*_RANKS, width // dim)):
        if 1 < shares < width and width % shares == 0:

            def formula(n: Norm[Tracked], shares: int = shares) -> Tracked:
                rows = n.x.moved(lambda y: y.reshape(*y.shape[:-1], shares, -1))
                rows = rows * ((rows * rows).mean() + n.eps).rsqrt()
                return rows.moved(lambda y: y.reshape(n.x.shape)) * n.weight

            yield by_token(norm, formula), shares
