"""Which mistake would explain a site that rounding does not."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.as_written import as_written
from llama_layers.verify.attention import OverHeads
from llama_layers.verify.bound import Bound
from llama_layers.verify.defined import where_defined
from llama_layers.verify.failing_site import Computable, FailingSite, wide
from llama_layers.verify.fitness import Fitness, floored, leaves_a_part
from llama_layers.verify.localised import counted_as, localised
from llama_layers.verify.mistakes import MISTAKES, Kind, Mistake
from llama_layers.verify.mistakes.registry import Change, Computed
from llama_layers.verify.operations import (
    Attention,
    Gate,
    Linear,
    Norm,
    Operation,
    Residual,
    Rope,
)
from llama_layers.verify.profiles import CONTRACT, Rounding, RoundingProfile
from llama_layers.verify.recompute import computed
from llama_layers.verify.report import Explanation
from llama_layers.verify.roundoff import read_in

# Every rounding that any engine is known for, but for a cache: what is read from it is another
# number, and no wider bound. A mistake that holds with neither of the two holds with no engine's.
_ALL = RoundingProfile(
    "all",
    norm_before_weight=True,
    phases="float32",
    rope_table=True,
    rope_arithmetic=True,
    scores=True,
    probabilities=True,
    sigmoid=True,
    silu=True,
    written_in="float32",
    softmax_in="float32",
    flushes=True,
    excess_precision=True,
)
_CACHED = replace(_ALL, kv_cache="float16")
# Operations that are computed in less time than their bounds.
_QUICK = (Norm, Rope, Gate, Residual, Attention)
# How much is looked at before all of it: the worst tokens, and the worst outputs of a product.
_TOKENS, _OUTPUTS = 3, 64
# The axes other than that of heads, or of channels where there are no heads.
_BUT_PARTS = (0, 1, 3)
# How many times as likely an explanation must be as another to be told without it, as a logarithm.
_ALIKE = 6.0
# What an explanation must gain in likelihood by what it assumes, as a logarithm: nothing by another
# formula, more by numbers read off the array.
_COSTS = {Kind.FORMULA: 0.0, Kind.ROUNDING: 2.0, Kind.SOLVED: 12.0, Kind.FITTED: 24.0}
# The same, for assuming it in some heads or channels only.
_PARTS = 12.0
# How many times our own errors, relative to what is usual, a port's may be with what explains them:
# where results are rounded last, and where only sums are, which other orders change much.
_PREDICTED = {True: 1.6, False: 16.0}
# Our own errors, relative to what is usual, in an array that was solved for.
_SOLVED_FOR = 0.5
# Errors below this share of the usual ones are as good as any.
_WELL = 1 / 64
# An explanation leaves an error below this share of the one that it explains.
_LESS = 0.9
# Of the elements that are wrong, the share that must differ from zero by more than the limit: with
# less, the limit is above the root mean square of what it is for, if that is normally distributed.
_TOLD = 0.25


@dataclass(frozen=True)
class _Found:
    explanation: Explanation
    fitness: Fitness
    """Of the whole array, with the mistake."""
    surprise: float
    """Minus the logarithm of the likelihood, with what it costs to assume the mistake."""


@np.errstate(all="ignore")  # with a mistake, numbers may overflow
def diagnose(
    failing: FailingSite,
    /,
    *,
    only: Collection[str] | None = None,
    strictly: bool = False,
    usually: bool = False,
    until: float = math.inf,
) -> tuple[Explanation, ...]:
    """The mistakes that would explain a failing site, the likeliest first.

    A mistake explains it if the bound of the operation with the mistake holds the port's array,
    and what is left looks like rounding: as large as in a run of ours, and without a part of what
    the mistake changes. Mistakes that only widen the bound have a test of their own. Mistakes in
    the formula are tried first, then too few bits, then what can be read off the array itself,
    until one leaves as little as our own run, and last, if nothing explains the site, a number for
    each token or output. Of those that explain it, the likeliest are told.

    Parameters
    ----------
    failing : FailingSite
        A site that failed.
    only : collection of str, optional
        Names of mistakes to try; all if not given.
    strictly : bool, optional
        Whether to allow no engine's further roundings, and to read nothing off the array.
    usually : bool, optional
        Whether to hold errors that are larger than usual, and within the limit, against what is
        usual instead of the limit, and to try roundings only.
    until : float, optional
        When to stop, of ``time.perf_counter()``.

    Returns
    -------
    tuple of Explanation
        Those that cannot be told apart from the port's array, by the likelihood of the errors that
        they leave; none if no mistake explains it.
    """
    chosen = [mistake for mistake in MISTAKES if only is None or mistake.name in only]
    if strictly:
        chosen = [m for m in chosen if m.kind < Kind.SOLVED and not m.loosens]
    if usually:
        chosen = [m for m in chosen if m.kind == Kind.ROUNDING or m.loosens]
    failing = as_written(failing)
    trial = _Trial(failing, usually=usually, profiles=(CONTRACT,) if strictly else None)
    if not trial.fails:
        return ()
    found: list[_Found] = []
    for kind in Kind:
        if kind == Kind.FITTED and found:
            break  # a number for each row would fit what one number explains
        for mistake in chosen:
            if mistake.kind == kind and time.perf_counter() < until:
                found += trial.found(mistake)
        if any(trial.is_well_explained(f.fitness) for f in found):
            break
    found.sort(key=lambda f: f.surprise)
    return tuple(f.explanation for f in found if f.surprise <= found[0].surprise + _ALIKE)


class _Trial:
    """A failing site, held against one mistake after the other by limits, or by what is usual."""

    def __init__(
        self,
        failing: FailingSite,
        *,
        usually: bool = False,
        profiles: tuple[RoundingProfile, ...] | None = None,
    ) -> None:
        self._failing = failing
        self._usually = usually
        self._formats = failing.formats
        profile = failing.formats.profile
        tried = (profile,) if profile is not CONTRACT else (CONTRACT, *failing.profiles)
        self._profiles = tried if profiles is None else profiles
        right = self._judged(failing.bound(failing.formats))
        self._right = right.exact
        ratio = right.ratio(failing.computed)
        self._wrong = ratio > 1
        if not self.fails:
            return
        self._scale = floored(right.usual)
        self._count = np.count_nonzero(~np.isinf(right.limit))
        self._error = self._fitness(right).error
        self._expected = self._own(right)
        self._parts = None if failing.site.pairwise else _some(self._wrong)
        self._tokens = _largest(self._by_token(ratio).max(axis=0), _TOKENS)
        if isinstance(failing.operation, Linear):
            worst = ratio.max(axis=(0, 1))
            self._outputs = _largest(worst, min(_OUTPUTS, int(np.count_nonzero(worst > 1))))
            self._worst = np.ix_(np.arange(len(ratio)), self._tokens, self._outputs)

    @property
    def fails(self) -> bool:
        """Whether there is anything to explain."""
        return bool(self._wrong.any())

    def found(self, mistake: Mistake) -> list[_Found]:
        """The ways in which a mistake explains the site: the best, and those as good."""
        found = [
            result
            for change in mistake.applied(self._failing)
            if self._possible(mistake, change)
            for result in self._explained(mistake, change)
        ]
        found.sort(key=lambda f: f.surprise)
        best = {f.explanation.detail: f for f in reversed(found)}
        return list(best.values())[::-1]

    def is_well_explained(self, fitness: Fitness) -> bool:
        """Whether no other explanation can leave much less."""
        return min(fitness.relative, fitness.scaled) <= 1.2 * self._expected

    def _fitness(self, bound: Bound) -> Fitness:
        return Fitness.of(self._failing.computed, bound, self._scale)

    def _own(self, right: Bound) -> float:
        """The errors of a run of ours, relative to what is usual; our own formula, once."""
        operation, formats = self._failing.operation, self._formats
        if self._failing.unsure is not None:
            return _SOLVED_FOR
        if formats.sums.name == "float64":
            return _WELL
        own = read_in(wide(computed(operation, np.dtype(np.float32))), formats.out)
        relative = Fitness.of(own, right, self._scale).relative
        # Where ours has no error, a formula with a mistake may have a rounding.
        return max(relative, _WELL) if relative else 1.0

    def _possible(self, mistake: Mistake, change: Change) -> bool:
        """Whether a mistake survives a look at less than is needed to explain the site by it."""
        operation = change.operation
        if isinstance(operation, Linear):
            return self._possible_product(operation)
        if not self._holds_at_worst(operation):
            return False
        parts = self._parts if mistake.shows_in_parts else None
        if (
            isinstance(operation, _QUICK)
            and not mistake.loosens
            and not self._is_near(operation, parts)
        ):
            return False
        bounds = (self._judged(operation.bound(formats)) for formats in self._liberal())
        computed = self._failing.computed
        here = np.s_[:] if parts is None else np.s_[:, :, parts]
        return any(self._holds(bound.ratio(computed)[here], self._wrong[here]) for bound in bounds)

    def _is_near(self, operation: Operation, parts: NDArray[np.bool_] | None) -> bool:
        """Whether what is wrong would err less with a mistake, by the numbers alone."""
        wrong = np.broadcast_to(self._token_axes(self._by_token(self._wrong)), self._wrong.shape)
        if parts is not None:
            wrong = wrong & self._part_axes(parts)
        exact = computed(operation, np.dtype(np.float64))
        error = np.abs(wide(self._failing.computed)[wrong] - exact[wrong])
        return bool(np.nansum(np.square(error)) < (_LESS * self._error) ** 2)

    def _holds_at_worst(self, operation: Computable) -> bool:
        """Whether a mistake explains what is wrong at the worst tokens, if it can be told soon."""
        if not isinstance(operation, Operation | Computed):
            return True
        if (few := operation.at_tokens(self._tokens)) is None:
            return True
        theirs, wrong = (self._at_tokens(y) for y in (self._failing.computed, self._wrong))
        here = (np.s_[:],) * (2 if self._failing.site.pairwise else 1) + (self._tokens,)
        bounds = (self._failing.widened(few.bound(how), here) for how in self._liberal())
        bounds = (self._limited(bound) for bound in bounds)
        return any((bound.ratio(theirs) <= 1)[wrong].all() for bound in bounds)

    def _at_tokens(self, array: np.ndarray) -> np.ndarray:
        """The array at the worst tokens."""
        return np.take(array, self._tokens, axis=2 if self._failing.site.pairwise else 1)

    def _possible_product(self, linear: Linear) -> bool:
        """Whether a mistake survives a look at the worst tokens and outputs of a product."""
        few = replace(
            linear,
            x=linear.x[:, self._tokens],
            weight=linear.weight[self._outputs],
            bias=None if linear.bias is None else linear.bias[self._outputs],
        )
        theirs = self._failing.computed[self._worst]
        bound = self._failing.widened(few.bound(self._liberal()[0]), self._worst)
        ratio = self._limited(bound).ratio(theirs)
        return self._holds(ratio, self._wrong[:, self._tokens])

    def _holds(self, ratio: NDArray[np.float64], wrong: NDArray[np.bool_]) -> bool:
        """Whether each token that is wrong is explained; others need no explanation."""
        return bool((self._by_token(ratio) <= 1)[self._by_token(wrong)].all())

    def _explained(self, mistake: Mistake, change: Change) -> Iterator[_Found]:
        """The largest ratio and the error that are left, where the mistake explains the array."""
        computed = self._failing.computed
        for profile in self._profiles:
            formats = replace(self._formats, profile=profile)
            bound, right = self._judged(change.operation.bound(formats)), None
            tokens, wrong = self._by_token(bound.ratio(computed)) <= 1, self._by_token(self._wrong)
            parts = self._parts if mistake.shows_in_parts and not tokens.all() else None
            if not tokens.all():
                right = self._judged(self._failing.bound(formats))
            if right is not None and parts is not None:
                bound = _partly(bound, right, self._part_axes(parts))
                tokens = self._by_token(bound.ratio(computed)) <= 1
            if right is not None and not tokens.all():
                bound = _partly(bound, right, self._token_axes(tokens))
            ratio = bound.ratio(computed).max()
            if ratio <= 1:
                fitness = self._fitness(bound)
                if self._is_evident(mistake, bound, fitness):
                    noun = "head" if computed.ndim == 4 else "channel"
                    part = "" if parts is None else counted_as(noun, np.flatnonzero(parts))
                    detail = localised(change.detail, wrong, tokens, part)
                    explanation = Explanation(mistake.name, detail, float(ratio))
                    surprise = self._count * fitness.surprise(self._expected / 2)
                    surprise += _COSTS[mistake.kind] + (0.0 if parts is None else _PARTS)
                    yield _Found(explanation, fitness, surprise)
                return

    def _is_evident(self, mistake: Mistake, bound: Bound, fitness: Fitness) -> bool:
        """Whether a bound that holds the array says enough of it."""
        # A bound that says nothing where the port is wrong explains nothing.
        judged = np.count_nonzero(self._wrong & ~np.isinf(bound.limit))
        if 2 * judged < np.count_nonzero(self._wrong):
            return False
        if mistake.shows is not None:
            return mistake.shows(self._failing, bound)
        most = _PREDICTED[self._formats.narrower is not None] * self._expected
        return (
            fitness.error < _LESS * self._error
            and min(fitness.relative, fitness.scaled) <= most
            and self._told_from_zero(bound)
            and not leaves_a_part(self._failing.computed, bound, self._right)
        )

    def _told_from_zero(self, bound: Bound) -> bool:
        """Whether enough of what is wrong is explained by a bound that zero would not hold.

        One that holds zero and the array alike says nothing of the array. Where a mistake makes
        zeros, they are told from what there should be.
        """
        judged = self._wrong & ~np.isinf(bound.limit)
        vague = bound.limit >= np.abs(np.where(bound.exact == 0, self._right, bound.exact))
        return bool(np.count_nonzero(judged & ~vague) >= _TOLD * np.count_nonzero(judged))

    def _by_token(self, array: np.ndarray) -> np.ndarray:
        """The largest for each token, [B, S]."""
        token = 2 if self._failing.site.pairwise else 1
        return np.asarray(array.max(axis=tuple({1, 2, array.ndim - 1} - {token})))

    def _token_axes(self, tokens: np.ndarray) -> np.ndarray:
        """An array [B, S] with the axes of the site's."""
        shape = [1] * self._failing.computed.ndim
        shape[0], shape[2 if self._failing.site.pairwise else 1] = tokens.shape
        return tokens.reshape(shape)

    def _part_axes(self, parts: np.ndarray) -> np.ndarray:
        """An array of heads or channels with the axes of the site's."""
        return parts.reshape(1, 1, -1, *(1,) * (self._failing.computed.ndim - 3))

    def _liberal(self) -> list[Rounding]:
        if self._formats.profile is not CONTRACT:
            return [self._formats]
        cached = isinstance(self._failing.operation, OverHeads) and any(
            profile.kv_cache is not None for profile in self._profiles
        )
        profiles = (_ALL, _CACHED) if cached else (_ALL,)
        return [replace(self._formats, profile=profile) for profile in profiles]

    def _judged(self, bound: Bound) -> Bound:
        bound = self._failing.widened(bound)
        return where_defined(self._limited(bound), self._failing.site, self._failing.recorded)

    def _limited(self, bound: Bound) -> Bound:
        return replace(bound, limit=bound.usual) if self._usually else bound


def _partly(mistaken: Bound, right: Bound, here: NDArray[np.bool_]) -> Bound:
    """One bound at some places, and the other elsewhere: only a part of a run may be wrong."""
    return Bound(
        np.where(here, mistaken.exact, right.exact),
        np.where(here, mistaken.limit, right.limit),
        np.where(here, mistaken.usual, right.usual),
    )


def _some(wrong: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """The heads or channels in which something is wrong, unless they are all."""
    parts = np.asarray(wrong.any(axis=_BUT_PARTS[: wrong.ndim - 1]))
    return None if parts.all() else parts


def _largest(values: np.ndarray, count: int) -> NDArray[np.intp]:
    return np.sort(np.argsort(-values, kind="stable")[:count])
