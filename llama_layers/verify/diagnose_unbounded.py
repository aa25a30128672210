"""Which mistake would explain a site that differs from its recomputation."""

from __future__ import annotations

import math
import time
from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.sites import LOGPROBS, Site, sites
from llama_layers.model.llama import Llama
from llama_layers.verify.build import matrix, operation_of
from llama_layers.verify.distance import distance
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.mistakes import MISTAKES, Kind, Mistake
from llama_layers.verify.mistakes.hidden_states import DETAIL, LATE, are_late
from llama_layers.verify.operations import Attention, Linear, Norm, Operation, Residual
from llama_layers.verify.recompute import Change, Recomputation, computed, same
from llama_layers.verify.report import Explanation
from llama_layers.verify.unbounded import Unbounded, apart
from llama_layers.verify.validate import Recorded, first_tokens

# Mistakes are tried on the first tokens, and on the first outputs of a product, before all.
_TOKENS, _OUTPUTS = 8, 64
# A mistake that leaves a larger share of the difference there is tried no further.
_LESS = 0.5
# What a layer that is left out makes of the input of whatever follows it.
_CONSEQUENCE = "input from the wrong place"
# Explanations that leave up to this many times the least difference count as equally good.
_ALIKE = 4.0
# If at most this many layers were not recorded, each is tried with the weights of every other.
_FEW_LAYERS = 2


class Candidate(NamedTuple):
    """A mistake somewhere between a site and the recorded arrays."""

    name: str
    detail: str
    left: Callable[[], float]
    """The difference that is left with it."""


@np.errstate(all="ignore")  # with a mistake, numbers may overflow
def diagnose_unbounded(
    unbounded: Unbounded,
    recorded: Recorded,
    walk: Recomputation,
    model: Llama,
    /,
    *,
    only: Collection[str] | None = None,
    until: float = math.inf,
) -> tuple[Explanation, ...]:
    """The mistakes that leave a difference like that of rounding, the likeliest first.

    Each is made since the recorded arrays, on inputs that are recomputed where they are missing:
    in one operation, in all that it can be made in, or in a whole layer.

    Parameters
    ----------
    unbounded : Unbounded
        A site that differs.
    recorded : Recorded
        The port's arrays.
    walk : Recomputation
        The exact recomputation, which has computed the site.
    model : Llama
        The model.
    only : collection of str, optional
        Names of mistakes to try; all if not given.
    until : float, optional
        When to stop, of ``time.perf_counter()``.

    Returns
    -------
    tuple of Explanation
        Those that leave about as little; none if no mistake explains the site.
    """
    if not math.isfinite(unbounded.difference) and unbounded.site.name != LOGPROBS:
        return ()
    chosen = [m for m in MISTAKES if only is None or m.name in only]
    between = _Between(unbounded, recorded, walk, model, chosen)
    found = []
    for candidate in between.candidates():
        if time.perf_counter() > until:
            break
        if only is None or candidate.name in only:
            left = candidate.left()
            if left <= unbounded.allowed:
                ratio = left / unbounded.allowed
                found.append(Explanation(candidate.name, candidate.detail, ratio))
    found.sort(key=lambda e: (e.ratio, e.name == _CONSEQUENCE))
    best: dict[str, Explanation] = {}
    for explanation in found:
        if explanation.ratio <= _ALIKE * found[0].ratio:
            best.setdefault(explanation.name, explanation)
    return tuple(best.values())


class _Between:
    """The sites between a site that differs and the recorded ones, with mistakes."""

    def __init__(
        self,
        unbounded: Unbounded,
        recorded: Recorded,
        walk: Recomputation,
        model: Llama,
        mistakes: list[Mistake],
    ) -> None:
        self._site = unbounded.site
        self._unbounded = unbounded
        self._recorded = recorded
        self._short = first_tokens(recorded, _TOKENS)
        self._known = walk.known()
        self._gap = walk.gap(unbounded.site)
        self._model = model
        kinds = (Kind.FORMULA, Kind.ROUNDING) if self._site.name == LOGPROBS else (Kind.FORMULA,)
        self._in_formulas = [m for m in mistakes if m.kind in kinds and not m.loosens]
        self._common = [m for m in mistakes if m.common]

    def candidates(self) -> Iterator[Candidate]:
        """Every mistake that could have been made, the more frequent first."""
        yield from self._in_one_operation()
        yield from self._everywhere()
        yield from self._in_whole_layers()

    def _in_one_operation(self) -> Iterator[Candidate]:
        same_layer = [place for place in self._gap.sites if place.layer == self._site.layer]
        for place in same_layer if len(self._gap.layers) <= 1 else [self._site]:
            operation = operation_of(place, place.routes[-1], self._known, self._model)
            failing = self._failing(place, operation, self._known)
            where = "" if place == self._site else f" That is at {place.name}."
            for mistake in self._in_formulas:
                for change in mistake.applied(failing):
                    left = partial(self._left_in_one, place, change.operation)
                    yield Candidate(mistake.name, change.detail + where, left)

    def _everywhere(self) -> Iterator[Candidate]:
        """Mistakes made in every operation, in those of layers, or in one block of each layer."""
        for mistake, form, places in self._forms():
            change = self._change(mistake, form, places)
            yield Candidate(mistake.name, form[0], partial(self._left_by, change))

    def _forms(self) -> Iterator[tuple[Mistake, tuple[str, int], set[str]]]:
        """The forms that a mistake takes, and the sites at which all of it is made at once."""
        if not self._common:
            return
        found: dict[tuple[int, tuple[str, int]], list[Site]] = {}

        def look(site: Site, operation: Operation, known: Recorded) -> Operation:
            failing = self._failing(site, operation, known)
            for index, mistake in enumerate(self._common):
                for key in _forms(mistake, failing):
                    found.setdefault((index, key), []).append(site)
            return operation

        Recomputation(self._short, self._model, self._quick, look).array(self._site)
        for (index, key), places in sorted(found.items(), key=lambda item: item[0][0]):
            for extent in _extents(places):
                yield self._common[index], key, extent

    def _change(self, mistake: Mistake, form: tuple[str, int], places: Collection[str]) -> Change:
        def change(site: Site, operation: Operation, known: Recorded) -> Computable:
            if site.name not in places:
                return operation
            forms = _forms(mistake, self._failing(site, operation, known))
            return forms.get(form, operation)

        return change

    def _in_whole_layers(self) -> Iterator[Candidate]:
        """A layer that was not run, or run with the weights of another."""
        layers = self._gap.layers
        for layer in layers:
            detail = f"The port seems to skip layer {layer}."
            yield Candidate("layer left out", detail, partial(self._left_by, _left_out([layer])))
        for since in (layers[i:] for i in range(len(layers) - 1)):
            detail = f"The port seems to skip layers {since[0]} to {since[-1]}."
            left = partial(self._left_by, _left_out(since))
            yield Candidate("last layers left out", detail, left)
        if len(layers) > _FEW_LAYERS:
            return
        late = are_late(self._recorded, self._model)
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
                    left = partial(self._left_by, _weights_of(self._model, layer, other))
                    yield Candidate(name, detail, left)

    def _failing(self, site: Site, operation: Operation, recorded: Recorded) -> FailingSite:
        sizes = {"B": recorded.batch, "S": recorded.count}
        shape = tuple(n if isinstance(n, int) else sizes[n] for n in site.shape)
        nothing = np.broadcast_to(np.float32(0), shape)
        array = self._unbounded.array if site == self._site else nothing
        return FailingSite(site, operation, array, self._unbounded.formats, recorded, self._model)

    @property
    def _quick(self) -> str:
        return "float64" if self._unbounded.formats.dtype == "float64" else "float32"

    def _left_in_one(self, place: Site, operation: Computable) -> float:
        """The difference that is left with a mistake in one operation."""
        if place == self._site and not self._possible(operation):
            return math.inf
        exact = computed(operation, np.dtype(np.float64))
        if place == self._site:
            return apart(self._recorded, self._unbounded.array, exact)
        arrays = ChainMap({place.name: exact}, self._recorded.arrays)  # type: ignore[arg-type]
        return self._left_by(same, replace(self._recorded, arrays=arrays))

    def _possible(self, operation: Computable) -> bool:
        """Whether a mistake survives a look at some tokens and outputs of a product."""
        if not isinstance(operation, Linear) or self._recorded.keep is not None:
            return True
        few = replace(
            operation,
            x=operation.x[:, :_TOKENS],
            weight=operation.weight[:_OUTPUTS],
            bias=None if operation.bias is None else operation.bias[:_OUTPUTS],
        )
        exact = computed(few, np.dtype(np.float64))
        return self._less(distance(exact, self._unbounded.array[:, :_TOKENS, :_OUTPUTS]))

    def _left_by(self, change: Change, recorded: Recorded | None = None) -> float:
        """The difference that a walk with a mistake leaves: of some tokens first, then of all."""
        short = first_tokens(recorded, _TOKENS) if recorded else self._short
        recorded = recorded or self._recorded
        looks_ahead = False

        def noted(site: Site, operation: Operation, known: Recorded) -> Computable:
            nonlocal looks_ahead
            changed = change(site, operation, known)
            if isinstance(changed, Attention) and changed.mask is not None:
                looks_ahead |= bool(np.triu(changed.mask, 1).any())
            return changed

        exact = Recomputation(short, self._model, self._quick, noted).array(self._site)
        left = apart(short, short.array(self._site.name), exact)
        if not looks_ahead and not self._less(left):  # what sees later tokens needs all of them
            return math.inf
        exact = Recomputation(recorded, self._model, change=change).array(self._site)
        return apart(self._recorded, self._unbounded.array, exact)

    def _less(self, left: float) -> bool:
        """Whether a mistake leaves so little of the difference that it is worth a closer look."""
        return left <= max(_LESS * self._unbounded.difference, self._unbounded.allowed)


def _forms(mistake: Mistake, failing: FailingSite) -> dict[tuple[str, int], Computable]:
    """What a common mistake makes of an operation: by its sentence, and its number among alike."""
    forms: dict[tuple[str, int], Computable] = {}
    counts: Counter[str] = Counter()
    for change in islice(mistake.applied(failing), mistake.common):
        forms[change.detail, counts[change.detail]] = change.operation
        counts[change.detail] += 1
    return forms


def _extents(places: list[Site]) -> list[set[str]]:
    """All places, and those in layers if others are not; or one block of each layer."""
    inside = [place for place in places if place.layer is not None]
    found = [places, inside] if 0 < len(inside) < len(places) else [places]
    if all(place.operation == "residual" for place in places):  # all is the whole layer left out
        roles = dict.fromkeys(place.role for place in places)
        found = [[place for place in places if place.role == role] for role in roles]
    return [{place.name for place in extent} for extent in found]


def _left_out(layers: Collection[int]) -> Change:
    """Layers that pass on what goes in."""

    def change(site: Site, operation: Operation, known: Recorded) -> Operation:
        if isinstance(operation, Residual) and site.layer in layers:
            return replace(operation, added=np.zeros_like(operation.added))
        return operation

    return change


def _weights_of(model: Llama, layer: int, other: int) -> Change:
    """A layer with the weights of another."""
    twins = {site.role: site for site in sites(model.config) if site.layer == other}

    def change(site: Site, operation: Operation, known: Recorded) -> Operation:
        if site.layer == layer and isinstance(operation, Norm):
            return replace(operation, weight=to_numpy(matrix(twins[site.role], model)[0]))
        if site.layer == layer and isinstance(operation, Linear):
            weight, bias = matrix(twins[site.role], model)
            return replace(
                operation, weight=to_numpy(weight), bias=None if bias is None else to_numpy(bias)
            )
        return operation

    return change
