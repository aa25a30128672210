"""What a mistake leaves of a difference at a site that was recomputed through others."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.types import Array
from llama_layers.layers.sites import LOGPROBS, Site
from llama_layers.model.llama import Llama
from llama_layers.verify.bound import Bound
from llama_layers.verify.distance import distance
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.fitness import Fitness, leaves_a_part
from llama_layers.verify.mistakes import Kind
from llama_layers.verify.operations import Operation
from llama_layers.verify.recompute import AtTokens, Change, Gap, Recomputation
from llama_layers.verify.unbounded import Unbounded, counts, own_errors
from llama_layers.verify.validate import Recorded, first_tokens

# Mistakes are tried on a few tokens before they are tried on all: this many, from the first wrong
# one, whose error is at least this share of the largest.
_TOKENS, _WRONG = 8, 0.1
# A mistake that leaves a larger share of the difference there is tried no further.
_LESS = 0.5
# How many times the errors of our own run with the mistake a port's may be: in formats in which
# each result is rounded, and in those in which other orders of sums matter as much.
_NARROW, _WIDE = 2.0, 16.0
# The same of errors that no other mistake can leave much less of.
_WELL = {True: 1.15, False: 1.5}
# How far apart two runs in few bits are that compute the same.
_SAME = 1e-3
# How many times those errors a token has that is right.
_RIGHT = {True: 10.0, False: 30.0}
# A limit of errors that count: no bound holds.
_ANY = 1e300


# A sentence that a mistake is told with, and its number among those that are told alike.
Form = tuple[str, int]


class Candidate(NamedTuple):
    """A mistake somewhere between a site and the recorded arrays."""

    name: str
    detail: str
    form: Form
    kind: Kind
    common: bool
    sure: bool
    """Whether no other is likely if it explains the site well, common or not."""
    places: Collection[str]
    """The sites that it changes, before any other."""
    few: Change
    """What it makes of operations on the first tokens."""
    change: Change
    """The same on all tokens."""


class Left(NamedTuple):
    """What is left with a mistake that explains a site."""

    ratio: float
    """The errors, over the largest that are as those of our own run."""
    surprise: float
    """Minus the logarithm of their likelihood, but for a constant."""
    well: bool
    """Whether no other mistake can leave much less."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some tokens of a trace, and what is right there in a dtype."""

    recorded: Recorded
    site: Site
    model: Llama
    dtype: str

    @cached_property
    def gap(self) -> Gap:
        """What lies between the site and the recorded ones."""
        return Recomputation(self.recorded, self.model).gap(self.site)

    @cached_property
    def layer(self) -> int | None:
        """The site's layer, or else the one of which most is recomputed."""
        if self.site.layer is not None:
            return self.site.layer
        layers = Counter(step.layer for step in self.gap.sites if step.layer is not None)
        return layers.most_common(1)[0][0] if layers else None

    @cached_property
    def _computed(self) -> dict[str, np.ndarray]:
        """What is right in that layer and outside of layers, and between layers."""
        walk = Recomputation(self.recorded, self.model, self.dtype)
        computed = {step: walk.array(step) for step in self.gap.sites}
        return {
            step.name: array
            for step, array in computed.items()
            if step.layer in (None, self.layer) or step.role == "layer"
        }

    @cached_property
    def array(self) -> np.ndarray:
        """The port's array of the site."""
        return self.recorded.array(self.site.name)

    @cached_property
    def right(self) -> np.ndarray:
        """What it should be."""
        return self._of_tokens(self._computed[self.site.name])

    @cached_property
    def counted(self) -> NDArray[np.bool_]:
        """Which numbers count."""
        return counts(self.recorded, self.site, self.array.shape)

    @cached_property
    def _after(self) -> Mapping[str, frozenset[str]]:
        """What is computed from each site of the gap, and that site."""
        found: dict[str, frozenset[str]] = {}
        for site in reversed(self.gap.sites):
            following = [step.name for step in self.gap.sites if site.name in step.routes[-1]]
            found[site.name] = frozenset([site.name]).union(*(found[n] for n in following))
        return found

    def after(self, place: Site) -> frozenset[str]:
        """What is computed from a site of the gap, and that site."""
        return self._after[place.name]

    def computed(self, place: Site) -> np.ndarray:
        """What is right at a site of the gap, of all tokens."""
        return self._computed[place.name]

    def before(self, places: Collection[str]) -> Recorded:
        """The trace, with what was recomputed and no change in some places can reach."""
        reached: frozenset[str] = frozenset().union(*(self._after[name] for name in places))
        arrays = {name: array for name, array in self._computed.items() if name not in reached}
        both: Mapping[str, Array] = ChainMap(self.recorded.arrays, arrays)  # type: ignore[arg-type]
        return replace(self.recorded, arrays=both)

    def walk(self, change: Change, places: Collection[str]) -> Recomputation:
        """The recomputation with a change in some places."""
        return Recomputation(self.before(places), self.model, self.dtype, change)

    def changed(self, change: Change, places: Collection[str]) -> np.ndarray:
        """The site, recomputed with a change in some places."""
        return self._of_tokens(self.walk(change, places).array(self.site))

    def _of_tokens(self, exact: np.ndarray) -> np.ndarray:
        return exact[:, -self.array.shape[1] :]


class Trial:
    """A site that differs, held against one mistake after the other."""

    def __init__(self, unbounded: Unbounded, recorded: Recorded, model: Llama) -> None:
        self._unbounded = unbounded
        self._dtype = unbounded.formats.dtype
        self.whole = Part(recorded, unbounded.site, model, "float64")
        self._own = Part(recorded, unbounded.site, model, self._dtype)
        usual = self._usual(self.whole.right, self._own.right)
        self.own_errors = usual  # of our own run, in each row
        self._scale = np.broadcast_to(usual, self.whole.array.shape)
        self._error = self._fitness(self._bound(self.whole.right, usual)).error
        self.few = self._first(self._first_wrong() + _TOKENS)
        if self.few is not self.whole:
            right = self.whole.right[:, : self.few.recorded.count]
            if distance(right, self.few.right) > _SAME:  # what is right depends on the last token
                self.few = self.whole
        self._half = self._first(self.few.recorded.count // 2)
        self._rows = self._scale[:, : self.few.array.shape[1]]
        self._few_error = self._size(self.few.right)
        self._mixing: dict[tuple[str, Form], bool] = {}

    def _first(self, count: int) -> Part:
        """The first tokens, in few bits."""
        whole = self.whole
        few = first_tokens(whole.recorded, count)
        quick = "float64" if self._dtype == "float64" else "float32"
        return whole if few is whole.recorded else Part(few, whole.site, whole.model, quick)

    def restricted(self, change: Change) -> Change:
        """A change made at wrong tokens only, where others after the first are right."""
        wrong = self._wrong
        if wrong[:, 1:].all():
            return change

        def restricted(site: Site, operation: Operation, known: Recorded) -> Computable:
            """Change an operation at these tokens."""
            made = change(site, operation, known)
            return made if made is operation else AtTokens(made, operation, wrong[:, : known.count])

        return restricted

    @cached_property
    def _wrong(self) -> NDArray[np.bool_]:
        """The tokens that are wrong, and padding."""
        whole = self.whole
        counted = np.where(whole.counted, whole.array.astype(np.float64) - whole.right, 0.0)
        tokens = tuple(range(2, counted.ndim))
        size = np.sqrt(np.mean(np.square(counted / self._scale), axis=tokens))
        return ~(size <= _RIGHT[self._is_narrow]) | ~whole.counted.all(axis=tokens)

    def part(self, recorded: Recorded) -> Part:
        """The part of the trace with as many tokens."""
        count = recorded.count
        return next(p for p in (self._half, self.few, self.whole) if p.recorded.count == count)

    def failing(
        self, place: Site, operation: Operation, part: Part, known: Recorded
    ) -> FailingSite:
        """A place between the site and the recorded ones, of which nothing is known."""
        sizes = {"B": known.batch, "S": known.count}
        shape = tuple(n if isinstance(n, int) else sizes[n] for n in place.shape)
        nothing = np.broadcast_to(np.float32(0), shape)
        array = part.array if place == part.site else nothing
        formats = self._unbounded.formats
        return FailingSite(place, operation, array, formats, known, part.model)

    def survives(self, candidate: Candidate) -> bool:
        """Whether a mistake is worth a closer look, after one at few tokens."""
        places, site = candidate.places, self.whole.site
        # What is read off the site's array is of all tokens, and so are mistakes at the last site.
        whole = candidate.kind == Kind.SOLVED or site.name == LOGPROBS
        if self.few is self.whole or (whole and places == {site.name}):
            return True
        place = next(step for step in self.whole.gap.sites if step.name in places)
        walk = self.few.walk(candidate.few, places)
        there = walk.array(place)
        size = self._size(there if place == site else walk.array(site))
        less = np.isfinite(size) and size <= max(_LESS * self._few_error, _WIDE)
        return less or self._mixes(candidate, place, there)

    def _mixes(self, candidate: Candidate, place: Site, few: np.ndarray) -> bool:
        """Whether a mistake makes of a token what depends on later ones."""
        if self._half is self.whole:
            return True
        if (key := (candidate.name, candidate.form)) not in self._mixing:
            half = self._half.walk(candidate.change, candidate.places).array(place)
            self._mixing[key] = bool(distance(half, few[:, : half.shape[1]]) > _SAME)
        return self._mixing[key]

    def left(self, candidate: Candidate) -> Left | None:
        """What a mistake leaves of all tokens; None if it does not explain the site."""
        change, places = candidate.change, candidate.places
        exact = self.whole.changed(change, places)
        if exact.shape != self.whole.array.shape:
            return None
        fitness = self._fitness(self._bound(exact, self._scale))
        if not fitness.error <= _LESS * self._error:
            return None
        own = self._own.changed(change, places)
        bound = self._bound(exact, self._usual(exact, own))
        fitness = self._fitness(bound)
        most = _NARROW if self._is_narrow else _WIDE
        # Nothing was computed with what is read off the array.
        solved = candidate.kind == Kind.SOLVED
        size = min(fitness.scaled, fitness.relative) if solved else fitness.relative
        if not size <= most or leaves_a_part(self.whole.array, bound, self.whole.right):
            return None
        # Whatever leaves errors like our own leaves as little as can be.
        well = _WELL[self._is_narrow]
        surprise = np.count_nonzero(self.whole.counted) * fitness.surprise(well)
        return Left(size / most, surprise, size <= well)

    @property
    def _is_narrow(self) -> bool:
        return FLOATS[self._dtype].precision < FLOATS["float32"].precision

    def _first_wrong(self) -> int:
        """The first token with an error that is not small beside the others'."""
        whole = self.whole
        off = np.where(whole.counted, whole.array.astype(np.float64) - whole.right, 0.0)
        off = np.nan_to_num(np.abs(off) / self._scale)
        tokens = off.max(axis=(0, *range(2, off.ndim)))
        return int(np.argmax(tokens >= _WRONG * tokens.max()))

    def _usual(self, exact: np.ndarray, own: np.ndarray) -> np.ndarray:
        return own_errors(exact, own, FLOATS[self._dtype].unit_roundoff)

    def _bound(self, exact: np.ndarray, usual: np.ndarray) -> Bound:
        usual = np.broadcast_to(usual, exact.shape)
        return Bound(exact, np.where(self.whole.counted, _ANY, np.inf), usual)

    def _fitness(self, bound: Bound) -> Fitness:
        return Fitness.of(self.whole.array, bound, self._scale)

    def _size(self, exact: np.ndarray) -> float:
        """The errors that few tokens have, over what is usual there."""
        part = self.few
        if exact.shape != part.array.shape:
            return np.inf
        theirs = part.array.astype(np.float64)
        off = np.where(theirs == exact, 0.0, theirs - exact) / self._rows
        off = off[part.counted & ~np.isnan(theirs)]
        known = off.size > 0 and bool(np.isfinite(off).all())
        return float(np.sqrt(np.mean(np.square(off)))) if known else np.inf
