"""Changes of results and weights, solved for on some tokens and held against the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.fit import FLAT
from llama_layers.verify.mistakes.mlp import NUMBERS, Function
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, by_token, mistake, moved
from llama_layers.verify.operations import Embedding, Gate, Linear, Norm, Operation, Residual
from llama_layers.verify.pointwise import ACTS
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array

_FLAT = Linear | Norm | Residual | Embedding | Gate
# Tokens that are needed to solve for a number of each output and to check it.
_TOKENS = 4
# What is left of the error in tokens that were not solved for, squared, at most.
_LEFT = 0.01
# Weights of an output that are looked at for one that is wrong; outputs whose rows are looked for.
_WRONG, _OUTPUTS = 4, 4096


def _rows(at: FailingSite) -> tuple[Float64Array, Float64Array]:
    """The right and the port's numbers, [tokens, outputs]; none where some are not finite."""
    width = at.computed.shape[-1]
    exact, theirs = at.bound(at.formats).exact, wide(at.computed)
    if at.site.pairwise or not (np.isfinite(exact).all() and np.isfinite(theirs).all()):
        return np.zeros((0, width)), np.zeros((0, width))
    return exact.reshape(-1, width), theirs.reshape(-1, width)


def _crossed(
    exact: Float64Array,
    theirs: Float64Array,
    fit: Callable[[Float64Array, Float64Array], Float64Array],
) -> Float64Array:
    """A number for each output, fitted to one half of the tokens for those of the other."""
    found = np.empty_like(exact)
    for half in (0, 1):
        found[half::2] = fit(exact[1 - half :: 2], theirs[1 - half :: 2])
    return found


def _wrong_outputs(at: FailingSite) -> NDArray[np.intp]:
    return np.flatnonzero((at.ratio > 1).any(axis=tuple(range(at.ratio.ndim - 1))))


def _holds(right: Float64Array, found: Float64Array, theirs: Float64Array) -> bool:
    """Whether little of the error is left in tokens that nothing was solved for."""
    error = np.sum(np.square(theirs - right))
    return bool(np.sum(np.square(theirs - found)) <= _LEFT * error)


@mistake(_FLAT, "a constant added", kind=Kind.FITTED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Adds the same to {0} at each token, up to {1:.3g}; it should add nothing."""
    exact, theirs = _rows(at)
    if len(exact) < _TOKENS:
        return None
    wrong = np.isin(np.arange(exact.shape[1]), outputs := _wrong_outputs(at))
    added = _crossed(exact, theirs, lambda y, z: np.where(wrong, np.median(z - y, axis=0), 0.0))
    if not _holds(exact, exact + added, theirs):
        return None
    more = _added(at, added.reshape(at.computed.shape))
    return more, _counted(outputs, exact.shape[1]), float(np.abs(added).max())


def _added(at: FailingSite, more: Float64Array) -> Computed:
    """The right result and more, which is as far off as the numbers it was solved from."""

    def bound(how: Rounding) -> Bound:
        right = at.bound(how)
        rounding = FLOATS[how.dtype].unit_roundoff * np.abs(more)
        limits = (2 * y + rounding for y in (right.limit, right.usual))
        return Bound(right.exact + more, *limits)

    return Computed(bound)


@mistake(Linear | Residual | Embedding | Gate, "outputs scaled", kind=Kind.FITTED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Multiplies {0} by numbers of their own, from {1:.4g} to {2:.4g}; it should leave them as
    they are."""
    return _scaled(at)


@mistake(Norm, "norm weight scaled by the channel", kind=Kind.FITTED)
def _(norm: Norm, at: FailingSite) -> Changed | None:
    """Scales {0} with {1:.4g} to {2:.4g} times the weight, as where quantisation moves scales of
    channels into the next matrix; it should scale with the weight of the checkpoint."""
    return _scaled(at)


def _scaled(at: FailingSite) -> Changed | None:
    """The result with each output times a number of its own."""
    exact, theirs = _rows(at)
    if len(exact) < _TOKENS:
        return None
    wrong = np.isin(np.arange(exact.shape[1]), outputs := _wrong_outputs(at))

    def fit(y: Float64Array, z: Float64Array) -> Float64Array:
        with np.errstate(all="ignore"):
            factors = np.sum(y * z, axis=0) / np.sum(np.square(y), axis=0)
        return np.where(wrong & np.isfinite(factors), factors, 1.0)

    factors = _crossed(exact, theirs, fit)
    if not _holds(exact, exact * factors, theirs):
        return None
    chosen = factors[:, outputs]
    same = len(outputs) == exact.shape[1] and np.ptp(chosen) < 1e-3 * np.abs(chosen).max()
    if same or np.abs(chosen).max() < 1e-3:
        return None
    changed = moved(at, np.multiply, factors.reshape(at.computed.shape))
    said = _counted(outputs, exact.shape[1])
    return changed, said, float(chosen.min()), float(chosen.max())


def _counted(outputs: NDArray[np.intp], of: int) -> str:
    if len(outputs) == 1:
        return f"output {outputs[0]}"
    return f"{len(outputs)} of {of} outputs"


@mistake(Linear, "outputs repeated", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Has {0}, which is where it belongs, too; it should have the rows of the matrix in their
    order."""
    return _placed_rows(linear, at, twice=True)


@mistake(Linear, "outputs in another order", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Has {0}; it should have the rows of the matrix in their order."""
    return _placed_rows(linear, at, twice=False)


def _placed_rows(linear: Linear, at: FailingSite, *, twice: bool) -> Iterator[Changed]:
    """Outputs of other rows, some of them `twice` or each once: with their bias, or their own."""
    for bias in (None, linear.bias):
        off = 0.0 if bias is None else wide(bias)
        exact, theirs = (y - off for y in _rows(at))
        if found := _places(at, exact, theirs, twice=twice):
            places, said = found
            if bias is None:
                yield moved(at, lambda y, places: y[..., places], places), said
            else:
                yield replace(linear, weight=linear.weight[places]), said
        if linear.bias is None:
            return


def _places(
    at: FailingSite, exact: Float64Array, theirs: Float64Array, *, twice: bool
) -> tuple[NDArray[np.intp], str] | None:
    """The row that each output has, and which of them are not their own."""
    outputs = _wrong_outputs(at)
    if len(exact) < _TOKENS or not 0 < len(outputs) <= _OUTPUTS:
        return None
    # By the numbers of one token, those next to each in order; by all others, which of them.
    one = int(np.argmax(np.abs(exact).sum(axis=-1)))
    order = np.argsort(exact[one], kind="stable")
    at_least = np.searchsorted(exact[one][order], theirs[one, outputs])
    near = np.clip(at_least[:, None] + np.arange(-8, 8), 0, len(order) - 1)
    rows = order[near]
    errors = np.sum(np.square(exact[:, rows] - theirs[:, outputs, None]), axis=0)
    best = np.take_along_axis(rows, errors.argmin(axis=1)[:, None], axis=1)[:, 0]
    places = np.arange(exact.shape[1])
    places[outputs] = best
    dim = at.config.head_dim
    # Of rows that come twice, most of the other places are not wrong.
    if twice != (2 * np.count_nonzero(np.isin(best, outputs)) < len(best)):
        return None
    heads = at.site.role in FLAT and (places.reshape(-1, dim) % dim == np.arange(dim)).all()
    if heads or (best == outputs).mean() > 0.5 or not _holds(exact, exact[:, places], theirs):
        return None
    return places, _placed(outputs, best)


def _placed(outputs: NDArray[np.intp], rows: NDArray[np.intp]) -> str:
    steps = rows - outputs
    if len(outputs) > 2 and np.mean(steps == np.median(steps)) > 0.9:
        step = int(np.median(steps))
        return f"at output n that of row n {'-' if step < 0 else '+'} {abs(step)}"
    said = [f"at output {n} that of row {row}" for n, row in zip(outputs, rows, strict=True)]
    return ", ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")


@mistake(Linear, "a wrong weight", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Has {0}; it should have {1}."""
    # In each wrong output, the one input to which the error is in proportion.
    exact, theirs = _rows(at)
    outputs = _wrong_outputs(at)
    x = wide(linear.x).reshape(-1, linear.x.shape[-1])
    if not 0 < len(outputs) <= _WRONG or len(exact) < _TOKENS or len(x) != len(exact):
        return None
    weight, found, right = wide(linear.weight), [], []
    for output in outputs:
        error = (theirs - exact)[:, output]
        fit = x[::2]
        size = np.maximum(np.sum(np.square(fit), axis=0), 1e-300)
        step = error[::2] @ fit / size
        left = np.sum(np.square(error[1::2, None] - step * x[1::2]), axis=0)
        channel = int(np.argmin(left))
        if left[channel] > _LEFT * np.sum(np.square(error[1::2])):
            return None
        old = weight[output, channel]
        new = old + float(error @ x[:, channel] / np.sum(np.square(x[:, channel])))
        weight[output, channel] = new = _flipped(linear.weight[output, channel], new)
        found.append(f"a weight [{output}, {channel}] of {new:.6g}")
        right.append(f"{old:.6g}")
    return replace(linear, weight=weight), " and ".join(found), " and ".join(right)


def _flipped(old: np.generic, new: float) -> float:
    """The number, or that which it is with one bit of its format flipped."""
    width = old.dtype.itemsize * 8
    bits = np.asarray(old).view(f"u{old.dtype.itemsize}")
    with np.errstate(all="ignore"):
        for bit in range(width):
            other = float((bits ^ bits.dtype.type(1 << bit)).view(old.dtype))
            if abs(other - new) <= 1e-4 * abs(float(old) - new):
                return other
    return new


@mistake(Linear, "input channels counted otherwise", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Counts {0}; it should count each input once."""
    found = _channel(linear, at)
    if found is None:
        return None
    channel, factor = found
    x = wide(linear.x)
    x[..., channel] *= factor
    return replace(linear, x=x), f"input channel {channel} {factor:.4g} times"


def _channel(linear: Linear, at: FailingSite) -> tuple[int, float] | None:
    """The input channel in whose part of the result all of the error lies, and its factor."""
    exact, theirs = _rows(at)
    x = wide(linear.x).reshape(-1, linear.x.shape[-1])
    if len(exact) < _TOKENS or len(x) != len(exact):
        return None
    error, columns = theirs - exact, wide(linear.weight)
    terms = np.sum((error @ columns) * x, axis=0)
    size = np.sum(np.square(x), axis=0) * np.sum(np.square(columns), axis=0)
    with np.errstate(all="ignore"):
        share = np.nan_to_num(np.square(terms) / size)
        channel = int(np.argmax(share))
        factor = float(1 + terms[channel] / size[channel])
    if share[channel] < (1 - _LEFT) * np.sum(np.square(error)):
        return None
    return channel, round(factor) if abs(factor - round(factor)) < 1e-3 else factor


@mistake(Linear, "a low-rank product added", kind=Kind.FITTED)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Adds a matrix of rank {0} to the weights, such as an adapter (LoRA); it should multiply by
    those of the checkpoint."""
    # The errors of half of the tokens span what those of the others lie in.
    exact, theirs = _rows(at)
    outputs = _wrong_outputs(at)
    error = (theirs - exact)[:, outputs]
    if len(error) < 2 * _TOKENS or len(outputs) < 2 * _TOKENS or len(error) > _OUTPUTS:
        return None
    squares = np.square(error)
    if 2 * max(squares.sum(axis=axis).max() for axis in (0, 1)) > squares.sum():
        return None  # most of it is in one output or in one token
    first, other = (np.linalg.svd(error[half::2], full_matrices=False) for half in (0, 1))
    energy = np.cumsum(np.square(first[1])) / np.sum(np.square(first[1]))
    rank = int(np.searchsorted(energy, 1 - 1e-4)) + 1
    if rank > min(len(energy) // 2, len(outputs) // 4):
        return None
    spans = [found[2][:rank] for found in (other, first)]  # of the other half each
    found = np.zeros_like(error)
    for half, span in enumerate(spans):
        found[half::2] = error[half::2] @ span.T @ span
    if np.sum(np.square(error - found)) > _LEFT * np.sum(np.square(error)):
        return None
    if rank == 1 and (_alike(error @ spans[0][0]) or _alike(spans[0][0]) or _channel(linear, at)):
        return None  # which is a constant of each output, or of each token, or one input channel
    whole = np.zeros(at.computed.shape)
    whole.reshape(len(error), -1)[:, outputs] = found
    return _added(at, whole), rank


def _alike(numbers: Float64Array) -> bool:
    return bool(np.std(numbers) < 0.1 * abs(np.mean(numbers)))


@mistake(Operation, "result clamped", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Clamps the result to {0:.6g} at most in magnitude; it should leave it as it is."""
    wrong, theirs, exact = at.ratio > 1, wide(at.computed), at.bound(at.formats).exact
    limit = float(np.abs(theirs[wrong]).max()) if wrong.any() else 0.0
    reached = np.abs(theirs) == limit
    if np.count_nonzero(wrong) < 2 or not reached[wrong].all() or not np.isfinite(limit):
        return None
    if np.nanmin(np.abs(exact[wrong])) < limit or np.abs(theirs).max() > limit:
        return None
    return moved(at, lambda y: np.clip(y, -limit, limit)), limit


@mistake(Gate, "gate or up clamped", kind=Kind.SOLVED)
def _(gate: Gate, at: FailingSite) -> Iterator[Changed]:
    """Clamps {0} to {1:.6g}; it should leave it as it is."""
    # The limit is the least magnitude in what is wrong, or just below it.
    wrong = at.ratio > 1
    few = np.count_nonzero(wrong) < 2
    if few or not np.isfinite(wide(at.computed)[wrong]).all():
        return
    numbers, act = NUMBERS[gate.act], ACTS[gate.act]
    with np.errstate(all="ignore"):
        own = wide(at.computed)[wrong] / numbers(wide(gate.gate))[wrong]
        limit = _round(float(np.median(np.abs(own))))
    yield (
        by_token(gate, lambda g: act(g.gate) * g.up.apply(lambda y: np.clip(y, -limit, limit))),
        "up",
        limit,
    )
    ratio = np.median(wide(at.computed)[wrong] / wide(gate.up)[wrong])
    top = _round(_inverse(numbers, float(ratio)))
    yield (
        by_token(gate, lambda g: act(g.gate.apply(lambda y: np.minimum(y, top))) * g.up),
        "gate",
        top,
    )
    both = by_token(
        gate,
        lambda g: (
            act(g.gate.apply(lambda y: np.minimum(y, top)))
            * g.up.apply(lambda y: np.clip(y, -top, top))
        ),
    )
    yield both, "gate and up", top


def _inverse(act: Function, y: float) -> float:
    """The number of which an activation is y, for y above 0."""
    low, high = 0.0, max(2.0 * abs(y), 2.0) + 2.0
    for _ in range(200):
        middle = (low + high) / 2
        below = bool(act(np.asarray(middle)) < y)
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def _round(number: float) -> float:
    """The number of few digits that it is near to."""
    near = float(f"{number:.3g}")
    return near if abs(near - number) <= 1e-3 * abs(number) else number
