"""What a port must have had at sites that were not recorded, for what it has at one that was.

Where every token of a site is computed from its own row of an earlier one, with no fewer numbers,
the earlier row can be solved for: by Newton's method, from what it should be. Everything between
the two is taken to be right. So the earlier site can be diagnosed as if it had been recorded, but
for how far off the solution may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.types import Array
from llama_layers.layers.sites import Site
from llama_layers.verify.build import matrix, operation_of
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.gap_trial import Part, Trial
from llama_layers.verify.mistakes.attention_arrays import scores_of, sinks_of, softmax, values_of
from llama_layers.verify.operations import Attention
from llama_layers.verify.recompute import Recomputation
from llama_layers.verify.roundoff import Float64Array

# Operations of which each token is computed from its own rows.
_LOCAL = {"linear", "norm", "gate", "residual"}
# Steps, and parts of a step of which the first that helps is taken.
_STEPS, _PARTS = 10, (1.0, 0.5, 0.25, 0.0625)
_NEARER = 0.9
# Starts that are tried for each row, and by what share of its size a row may move from one: farther
# away there may be other solutions.
_TRIED, _FAR = 3, 0.25
# A number that should be zero may be off by this many times what is usual.
_ZERO = 4.0
# A token is wrong if it leaves more than this many times what a solved one may leave.
_WRONG = 100.0
# The share of the wrong tokens that must be solved for.
_ENOUGH = 0.75
# By what scores are multiplied in a start, and at what they are capped, or what hidden ones are.
_SIZES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 20.0, 30.0, 50.0)
_PAGES, _FEW_PAGES = (1, 2, 4, 8, 16, 32), 8
_SCALES = (0.0, 0.25, 0.5, 0.7, 0.85, 1.2, 1.4, 2.0, 4.0)
# A row is solved for if it leaves less than that of the errors of our own run.
_SOLVED = 0.25
# By what share of its size a number is moved to see what follows from it.
_MOVE = 1e-6
# Products that a site may take to be solved for, in one step, and numbers that are held at a time.
_MOST, _HELD = 1e10, 1 << 22
# Singular values below that share of the largest tell nothing.
_LEAST = 1e-9
# Tokens up to which it is tried where attention begins or ends.
_FEW_TOKENS = 64


def solvable(part: Part) -> Iterator[Site]:
    """The sites that may be solved for, the last first."""
    *places, site = part.gap.sites
    for place in reversed(places):
        inside = len(part.gap.layers) < 2 or place.layer is None
        if inside and _follows(part, place) <= _LOCAL and _width(place) <= _width(site):
            yield place


def is_affine(part: Part, place: Site) -> bool:
    """Whether what follows from a site is an affine function of it, so that one solution exists."""
    return _follows(part, place) <= {"linear", "residual"}


def _follows(part: Part, place: Site) -> set[str]:
    """The operations between a site and the recorded one."""
    names = part.after(place) - {place.name}
    return {step.operation for step in part.gap.sites if step.name in names}


def pulled_back(trial: Trial, place: Site) -> FailingSite | None:
    """Solve for a site, and say how far off the solution may be: infinitely where there is none.

    None if that would take too long, if only the last token was recorded, or if not enough tokens
    that are wrong can be solved for.
    """
    part = trial.whole
    if part.array.shape[1] < part.recorded.count or _work(part, place) > _MOST:
        return None
    rows, starts = _Rows(part, place), _starts(part, place)
    size = trial.own_errors.reshape(len(rows.right), -1)[:, :1] * np.ones(rows.theirs.shape[1])
    enough = _SOLVED * np.linalg.norm(size, axis=1)
    x, solved = rows.right, np.asarray(~rows.judged)
    begun = np.concatenate([x[None], starts.reshape(len(starts), *x.shape)])
    far = np.linalg.norm(rows.after(begun) - rows.theirs, axis=-1)
    wrong = rows.judged & (far[0] > _WRONG * enough)
    order = np.argsort(np.nan_to_num(far, nan=np.inf), axis=0)[:_TRIED]
    for start in np.take_along_axis(begun, order[..., None], axis=0):
        found, near = _newton(rows, start, np.asarray(~solved), enough)
        x = np.where((near & ~solved)[:, None], found, x)
        solved |= near
        if solved.all():
            break
    solved &= rows.judged
    if np.count_nonzero(solved & wrong) < _ENOUGH * np.count_nonzero(wrong):
        return None
    back = rows.inverse(x)
    unsure = np.sqrt(np.square(back) @ np.square(size)[..., None])[..., 0]
    # What may be zero is.
    array = np.where(solved[:, None], np.where(np.abs(x) <= _ZERO * unsure, 0.0, x), rows.right)
    unsure = np.where(solved[:, None], unsure, np.inf)
    known = part.before([place.name])
    operation = operation_of(place, place.routes[-1], known, part.model)
    failing = trial.failing(place, operation, part, known)
    return replace(failing, computed=array.reshape(rows.shape), unsure=unsure.reshape(rows.shape))


def _newton(
    rows: _Rows, start: Float64Array, chosen: NDArray[np.bool_], enough: Float64Array
) -> tuple[Float64Array, NDArray[np.bool_]]:
    """Rows from which the recorded ones follow, and which of the chosen ones were found."""
    x = start
    most = np.inf if rows.affine else _FAR * np.linalg.norm(start, axis=1)
    left = rows.theirs - rows.after(x[None])[0]
    far = np.linalg.norm(left, axis=1)
    for _ in range(_STEPS):
        done = np.asarray(~chosen | (far <= enough))
        if done.all():
            break
        few = np.flatnonzero(~done)
        move = np.zeros_like(x)
        move[few] = np.einsum("tij,tj->ti", rows.inverse(x, few), left[few])
        for share in _PARTS:
            tried = np.where(done[:, None], x, x + share * move)
            other = rows.theirs - rows.after(tried[None])[0]
            new = np.linalg.norm(other, axis=1)
            better = ~done & (new < _NEARER * far)
            x, left = (np.where(better[:, None], a, b) for a, b in ((tried, x), (other, left)))
            far, done = np.where(better, new, far), done | better
            if done.all():
                break
        # Some came no nearer; or too far, where there may be other solutions.
        chosen &= done & (np.linalg.norm(x - start, axis=1) <= most)
    return x, chosen & (far <= enough)


class _Rows:
    """A site's rows, and what follows from them at the recorded one, each token by itself."""

    def __init__(self, part: Part, place: Site) -> None:
        self._site, self._place, self._model = part.site, place, part.model
        known = part.before([place.name])
        self.affine = is_affine(part, place)
        self.shape = part.computed(place).shape
        self.right = _flat(part.computed(place)).astype(np.float64)
        self.theirs = _flat(part.array).astype(np.float64)
        judged = _flat(part.counted) & np.isfinite(self.theirs)
        self.judged = np.asarray(judged.all(axis=1))
        self.theirs = np.where(self.judged[:, None], self.theirs, 0.0)
        names = {name for step in part.gap.sites for name in step.routes[-1]}
        names -= part.after(place)
        self._known = {name: _flat(known.array(name))[None] for name in names & known.arrays.keys()}
        self._recorded = replace(known, keep=None, input_ids=None, count=len(self.right))

    def after(self, rows: Float64Array) -> Float64Array:
        """What follows from rows [N, tokens, width]."""
        arrays: dict[str, Array] = {
            name: np.broadcast_to(array, (len(rows), *array.shape[1:]))
            for name, array in self._known.items()
        }
        arrays[self._place.name] = rows
        recorded = replace(self._recorded, arrays=arrays, batch=len(rows))
        return Recomputation(recorded, self._model).array(self._site)

    def inverse(self, rows: Float64Array, few: NDArray[np.intp] | None = None) -> Float64Array:
        """How rows change with what follows from them, [tokens, width, width there]."""
        if few is not None:
            return self._some(few).inverse(rows[few])
        if self.affine and len(rows) > 1:  # the same for all
            return np.repeat(self.inverse(rows, np.arange(1)), len(rows), axis=0)
        tokens, width = rows.shape
        step = _MOVE * np.maximum(np.sqrt(np.mean(np.square(rows), axis=1)), 1e-300)
        here = self.after(rows[None])[0]
        slopes = np.empty((width, *here.shape))
        every = max(1, _HELD // (tokens * self._model.config.intermediate_size))
        for start in range(0, width, every):
            some = np.arange(start, min(start + every, width))
            moved = np.repeat(rows[None], len(some), axis=0)
            moved[np.arange(len(some)), :, some] += step
            slopes[some] = (self.after(moved) - here) / step[:, None]
        return np.linalg.pinv(slopes.transpose(1, 2, 0), rcond=_LEAST)

    def _some(self, few: NDArray[np.intp]) -> _Rows:
        """Some of the rows."""
        some = copy(self)
        some._known = {name: array[:, few] for name, array in self._known.items()}
        some._recorded = replace(self._recorded, count=len(few))
        return some


def _starts(part: Part, place: Site) -> Float64Array:
    """What the site may be: attention to other runs of tokens, and with scores of other sizes."""
    operation = operation_of(place, place.routes[-1], part.before([place.name]), part.model)
    if not isinstance(operation, Attention) or operation.k.shape[1] > _FEW_TOKENS:
        return np.zeros((0, *part.computed(place).shape))
    scores, values = scores_of(operation), values_of(operation)
    allowed = np.broadcast_to(np.asarray(operation.mask)[:, None], scores.shape)
    most = int(_MOST * _width(place) / _work(part, place))
    weights = islice(_weights(scores, allowed, sinks_of(operation)), max(most, 1))
    return np.stack([(p @ values).transpose(0, 2, 1, 3) for p in weights])


def _weights(
    scores: Float64Array, allowed: NDArray[np.bool_], sinks: Float64Array
) -> Iterator[Float64Array]:
    """What attention may weigh with: other runs of tokens, or other functions of the scores."""
    count = scores.shape[-1]
    queries, keys = np.indices((count, count))
    for first in range(count):
        for run in ((keys >= first) & (keys <= queries), keys <= first):
            yield softmax(scores, np.broadcast_to(run, scores.shape), sinks)
    for size in (n for n in _PAGES if n < count):
        for page in range(0, count, size):
            there = (keys >= page) & (keys < page + size)
            yield softmax(scores, allowed & ~there, sinks)
            for other in range(0, count, size) if count <= _FEW_PAGES * size else ():
                twice = (keys >= other) & (keys < other + size)
                yield softmax(
                    scores + math.log(2) * twice, allowed & ~(there & (other != page)), sinks
                )
    hidden = np.where(allowed, scores, -np.inf)
    for kept in range(1, count):
        yield softmax(
            scores, hidden >= np.partition(hidden, -kept, axis=-1)[..., -kept, None], sinks
        )
    every = np.ones_like(allowed)
    for bound in _SIZES:
        yield softmax(np.where(allowed, scores, -bound), every, sinks)
        yield softmax(np.where(allowed, scores, scores - bound), every, sinks)
        yield softmax(bound * np.tanh(scores / bound), allowed, sinks)
    for scale in _SCALES:
        yield softmax(scale * scores, allowed, sinks)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0] * array.shape[1], -1)


def _width(site: Site) -> int:
    return math.prod(n for n in site.shape[2:] if isinstance(n, int))


def _work(part: Part, place: Site) -> float:
    """How many products a step takes, about."""
    tokens, width = part.array.shape[0] * part.array.shape[1], _width(place)
    after = [step for step in part.gap.sites if step.name in part.after(place) - {place.name}]
    sizes = [math.prod(matrix(s, part.model)[0].shape) for s in after if s.operation == "linear"]
    return float(width) * tokens * (sum(sizes) + 20 * width**2 * (not is_affine(part, place)))
