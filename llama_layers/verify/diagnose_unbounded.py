"""Which mistake would explain a site that differs from its recomputation."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np

from llama_layers.layers.sites import LOGPROBS, Site
from llama_layers.model.llama import Llama
from llama_layers.verify.build import operation_of
from llama_layers.verify.diagnose import diagnose
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.gap_scale import scaled
from llama_layers.verify.gap_trial import Candidate, Form, Part, Trial
from llama_layers.verify.mistakes import MISTAKES, Kind, Mistake
from llama_layers.verify.mistakes.hidden_states import DETAIL, LATE, NORMED, are_late
from llama_layers.verify.operations import Logprobs, Operation
from llama_layers.verify.pull_back import is_affine, pulled_back, solvable
from llama_layers.verify.pull_inner import inner
from llama_layers.verify.recompute import Change
from llama_layers.verify.report import Explanation
from llama_layers.verify.unbounded import Unbounded
from llama_layers.verify.validate import Recorded
from llama_layers.verify.whole_layers import left_out, weights_of

# What a layer that is left out makes of the input of whatever follows it.
_CONSEQUENCE = "input from the wrong place"
# How many times as likely an explanation must be as another to be told without it, as a logarithm.
_ALIKE = 6.0
# What an explanation must gain in likelihood by what it assumes, as a logarithm.
_COSTS = {Kind.FORMULA: 0.0, Kind.ROUNDING: 2.0, Kind.SOLVED: 12.0}
# The same of mistakes that are less common: where two leave the same, the common one is told.
_RARE = 7.0
# Mistakes that are made in a trace, and not in an operation: they count as common.
_LIKELY = (LATE, NORMED)
# Mistakes that are read off an array, but can be seen without it.
_UNSEEN = ("zeros", "tokens in another place")
# How many forms of a mistake are tried at most, but at the site itself.
_FORMS = 16
# Groups of mistakes that are tried before sites are solved for.
_COMMON = 2
# If at most this many layers were not recorded, each is tried with the weights of every other.
_FEW_LAYERS = 2


@dataclass(frozen=True)
class _Found:
    explanation: Explanation
    surprise: float
    """Minus the logarithm of the likelihood, with what it costs to assume the mistake."""


@np.errstate(all="ignore")  # with a mistake, numbers may overflow
def diagnose_unbounded(
    unbounded: Unbounded,
    recorded: Recorded,
    model: Llama,
    /,
    *,
    only: Collection[str] | None = None,
    until: float = math.inf,
) -> tuple[Explanation, ...]:
    """The mistakes that leave errors like those of rounding, the likeliest first.

    Each is made since the recorded arrays, on inputs that are recomputed where they are missing:
    in one operation, in all of a layer or of all layers that it can be made in, or in a whole
    layer. It explains the site if the errors that it leaves are about as large as those of our own
    run with the mistake, and have no part of what it changes.

    Parameters
    ----------
    unbounded : Unbounded
        A site that differs.
    recorded : Recorded
        The port's arrays.
    model : Llama
        The model.
    only : collection of str, optional
        Names of mistakes to try; all if not given.
    until : float, optional
        When to stop, of ``time.perf_counter()``.

    Returns
    -------
    tuple of Explanation
        Those that are about as likely; none if no mistake explains the site.
    """
    far = unbounded.difference
    if math.isnan(far) or (math.isinf(far) and unbounded.site.name != LOGPROBS):
        return ()
    if np.isnan(unbounded.array.astype(np.float64)).all() or unbounded.site.pairwise:
        return ()
    trial = Trial(unbounded, recorded, model)
    between = _Between(trial, only)
    found: list[_Found] = []
    enough = any_well = False
    first = ((-1, group) for group in between.of_logprobs())
    for number, (last, candidates) in chain(first, enumerate(between.groups())):
        if number == _COMMON and not any_well and (solved := _solved_for(trial, only, until)):
            return solved
        for candidate in candidates:
            if time.perf_counter() > until:
                break
            left = trial.left(candidate) if trial.survives(candidate) else None
            if left is not None:
                explanation = Explanation(candidate.name, candidate.detail, left.ratio)
                cost = _COSTS[candidate.kind] + (0.0 if candidate.common else _RARE)
                found.append(_Found(explanation, left.surprise + cost))
                enough |= left.well and (candidate.common or candidate.sure)
                any_well |= left.well or candidate.places == {LOGPROBS}
        if enough or (last and any_well) or time.perf_counter() > until:
            break
    found.sort(key=lambda f: (f.surprise, f.explanation.name == _CONSEQUENCE))
    best: dict[str, Explanation] = {}
    for each in found:
        if each.surprise <= found[0].surprise + _ALIKE:
            best.setdefault(each.explanation.name, each.explanation)
    names = sorted(best, key=lambda name: name == _CONSEQUENCE)
    return tuple(best[name] for name in names)


def _solved_for(
    trial: Trial, only: Collection[str] | None, until: float
) -> tuple[Explanation, ...]:
    """The mistakes at the sites that can be solved for, those that assume the least first."""
    found: list[tuple[int, tuple[Explanation, ...]]] = []

    def diagnosed(failing: FailingSite, *, fitted: bool = True) -> None:
        causes = diagnose(failing, only=only, until=until)
        if not causes:
            return
        kind = min(m.kind for m in MISTAKES if m.name == causes[0].name)
        # A block that is not added in some channels is a product that is wrong there.
        part = failing.site.operation == "residual" and causes[0].detail.startswith("At ")
        if fitted or kind != Kind.FITTED:
            where = f" That is at {failing.site.name}."
            told = (replace(cause, detail=cause.detail + where) for cause in causes)
            found.append((kind + len(Kind) * part, tuple(told)))

    for place in solvable(trial.whole):  # the last first
        if (failing := pulled_back(trial, place)) is not None:
            before = [*inner(trial, failing)]
            # What few channels of a gate make of a product is of low rank.
            diagnosed(failing, fitted=not before)
            for each in before:
                diagnosed(each)
            if found and is_affine(trial.whole, place):
                break  # there is no other solution
    # Zeros of a gate are inputs that the next product leaves out: any of the two may be meant.
    found.reverse()  # of alike ones the first place
    found.sort(key=lambda each: each[0])
    alike = [told for kind, told in found if kind < Kind.FITTED or kind == found[0][0]]
    names = {cause.name: cause for told in reversed(alike) for cause in reversed(told)}
    return tuple(reversed(names.values()))


class _Between:
    """The operations between a site and the recorded arrays, with mistakes."""

    def __init__(self, trial: Trial, only: Collection[str] | None) -> None:
        self._trial, self._few = trial, trial.few
        self._site, self._model = trial.few.site, trial.few.model
        self._only = only
        self._places, self._layers = trial.whole.gap.sites, trial.whole.gap.layers

    def groups(self) -> Iterator[tuple[bool, Iterator[Candidate]]]:
        """Every mistake that could have been made, the more frequent first.

        With each group, whether any mistake that explains a site in it makes others unlikely.
        """
        layers = (c for c in self._in_whole_layers() if self._only is None or c.name in self._only)
        formulas = self._chosen(Kind.FORMULA)
        common = [m for m in formulas if _is_common(m)]
        solved = self._chosen(Kind.SOLVED)
        yield False, chain(self._made(common, self._examples), layers)
        rare = [m for m in formulas if m not in common]
        # At the site itself they are soon tried: all that they take is there.
        few, whole = self._few, self._trial.whole
        each = chain(((m, few) for m in rare), ((m, whole) for m in solved))
        if self._site.name != LOGPROBS:
            yield False, (c for m, part in each for c in self._forms(m, self._site, part))
        # A number for each token tells too little of what is rare in layers.
        few_numbers = self._site.name == LOGPROBS
        places = [p for p in self._examples if p.layer is None or not few_numbers]
        yield True, self._made(rare, places)
        yield True, self._made(self._chosen(Kind.ROUNDING), places)
        yield (
            True,
            chain(
                scaled(self._trial, self._alone(places), self._only),
                self._made([m for m in solved if m.name in _UNSEEN], places),
            ),
        )

    def of_logprobs(self) -> Iterator[tuple[bool, Iterator[Candidate]]]:
        """Mistakes in log-probabilities themselves: all others take a run of the whole model."""
        if self._site.name != LOGPROBS:
            return
        whole = self._trial.whole
        for mistake in self._chosen(Kind.FORMULA):
            yield False, self._forms(mistake, self._site, whole)
        each = self._chosen(Kind.SOLVED)
        yield True, (c for m in each for c in self._forms(m, self._site, whole))

    def _chosen(self, kind: Kind) -> list[Mistake]:
        """The mistakes of a kind that are tried."""
        return [
            m
            for m in MISTAKES
            if m.kind == kind and not m.loosens and (self._only is None or m.name in self._only)
        ]

    def _alone(self, examples: list[Site]) -> list[tuple[Site, ...]]:
        """Each site outside of layers, and those of each role in layers."""
        places = sorted(examples, key=lambda p: p.operation not in ("residual", "attention"))
        return [
            (place,)
            if place.layer is None
            else tuple(p for p in self._places if p.layer is not None and p.role == place.role)
            for place in places
        ]

    def _made(self, mistakes: list[Mistake], examples: list[Site]) -> Iterator[Candidate]:
        """Mistakes made at some sites, and at others of their roles."""
        for mistake in mistakes:
            alone: list[Candidate] = []
            places: dict[Form, list[Site]] = {}
            for place in examples:
                if mistake.kind == Kind.SOLVED and place == self._site:
                    continue  # that is tried with the port's array
                for candidate in self._forms(mistake, place, self._few):
                    places.setdefault(candidate.form, []).append(place)
                    rare = mistake.kind == Kind.FORMULA and not _is_common(mistake)
                    tried = place == self._site and rare
                    if not tried and (place.layer is None or len(self._layers) == 1):
                        alone.append(candidate)
            for form, found in places.items():
                for extent in self._extents(found):
                    change = self._change(mistake, form, extent)
                    yield self._candidate(mistake, form[0], form, extent, change, change)
            for candidate in alone:
                # Keys and values that are swapped are so in both projections.
                common = candidate.common and len(places[candidate.form]) == 1
                yield candidate._replace(common=common)

    def _candidate(
        self,
        mistake: Mistake,
        detail: str,
        form: Form,
        places: Collection[str],
        few: Change,
        change: Change,
    ) -> Candidate:
        name, kind, common = mistake.name, mistake.kind, _is_common(mistake)
        few, change = (self._trial.restricted(each) for each in (few, change))
        sure = places == {self._site.name} and name != _CONSEQUENCE
        return Candidate(name, detail, form, kind, common, sure, places, few, change)

    @property
    def _examples(self) -> list[Site]:
        """The sites outside of layers, and those of one layer."""
        return [p for p in self._places if p.layer in (None, self._few.layer)]

    def _extents(self, found: list[Site]) -> Iterator[set[str]]:
        """All places that a mistake can be made in at once, in one layer or in all of them."""
        roles = list(dict.fromkeys(p.role for p in found if p.layer is not None))
        everywhere = [p for p in self._places if p.layer is not None and p.role in roles]
        outside = [p for p in found if p.layer is None]
        # All blocks that are not added are the whole layer left out.
        together = not all(p.operation == "residual" for p in everywhere)
        extents = [[*everywhere, *outside], everywhere] if together else []
        if len(self._layers) > 1:
            extents += [[p for p in everywhere if p.role == role] for role in roles]
        told = {frozenset(p.name for p in extent) for extent in extents}
        yield from (set(names) for names in sorted(told, key=len, reverse=True) if len(names) > 1)

    def _forms(self, mistake: Mistake, place: Site, part: Part) -> Iterator[Candidate]:
        """The forms of a mistake at one place: by its sentence, and its number among alike."""
        recorded = part.before([place.name])
        operation = operation_of(place, place.routes[-1], recorded, self._model)
        failing = self._trial.failing(place, operation, part, recorded)
        most = None if place == self._site else _FORMS
        for form, made in islice(_numbered(mistake, failing), most):
            where = "" if place == self._site else f" That is at {place.name}."
            few = _one(place, made)
            # What is read off the array would be other numbers on our own run's inputs.
            solved = mistake.kind == Kind.SOLVED and place == self._site
            change = few if solved else self._change(mistake, form, {place.name})
            if isinstance(made, Logprobs) and made.logits is vars(operation).get("logits"):
                change = _with_fields(place, made)
            detail = form[0] + where
            yield self._candidate(mistake, detail, form, {place.name}, few, change)

    def _change(self, mistake: Mistake, form: Form, places: Collection[str]) -> Change:
        def change(site: Site, operation: Operation, known: Recorded) -> Computable:
            if site.name not in places:
                return operation
            failing = self._trial.failing(site, operation, self._trial.part(known), known)
            for found, made in _numbered(mistake, failing):
                if found == form:
                    return made
            return operation

        return change

    def _in_whole_layers(self) -> Iterator[Candidate]:
        """A layer that was not run, or run with the weights of another."""
        layers, sources = self._layers, self._trial.whole.recorded

        def candidate(name: str, detail: str, change: Change, since: int) -> Candidate:
            places = {p.name for p in self._places if p.layer is not None and p.layer >= since}
            form = detail, 0
            return Candidate(name, detail, form, Kind.FORMULA, False, True, places, change, change)

        for layer in layers:
            detail = f"The port seems to skip layer {layer}."
            yield candidate("layer left out", detail, left_out([layer]), layer)
        for since in (layers[i:] for i in range(len(layers) - 1)):
            detail = f"The port seems to skip layers {since[0]} to {since[-1]}."
            yield candidate("last layers left out", detail, left_out(since), since[0])
        if len(layers) > _FEW_LAYERS:
            return
        late = are_late(sources, self._model)
        for layer in layers:
            for other in range(self._model.config.num_hidden_layers):
                if other != layer:
                    name = "another layer's weights"
                    detail = (
                        f"The port seems to run layer {layer} with the weights of layer {other}."
                    )
                    # The layer before was computed from what is said to be its output.
                    if late and other == layer - 1:
                        name, detail = LATE, DETAIL
                    yield candidate(name, detail, weights_of(self._model, layer, other), layer)


def _is_common(mistake: Mistake) -> bool:
    return bool(mistake.common) or mistake.name in _LIKELY


def _one(place: Site, made: Computable) -> Change:
    def change(site: Site, operation: Operation, known: Recorded) -> Computable:
        return made if site.name == place.name else operation

    return change


def _with_fields(place: Site, made: Logprobs) -> Change:
    """Other log-probabilities of any logits."""

    def change(site: Site, operation: Operation, known: Recorded) -> Computable:
        if site.name != place.name or not isinstance(operation, Logprobs):
            return operation
        return replace(made, logits=operation.logits)

    return change


def _numbered(mistake: Mistake, failing: FailingSite) -> Iterator[tuple[Form, Computable]]:
    counts: Counter[str] = Counter()
    for change in mistake.applied(failing):
        yield (change.detail, counts[change.detail]), change.operation
        counts[change.detail] += 1
