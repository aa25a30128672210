"""What can be said of a site whose inputs were not recorded: no bound, but a likeness."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.tap import Tap
from llama_layers.model.llama import Llama
from llama_layers.verify.build import operation_of
from llama_layers.verify.distance import distance
from llama_layers.verify.hypotheses import HYPOTHESES
from llama_layers.verify.hypotheses.composed import composed
from llama_layers.verify.hypotheses.hypothesis import Computable, Kind
from llama_layers.verify.inherited import Inherited, Run, computed
from llama_layers.verify.operations import Formats, Linear
from llama_layers.verify.report import Explanation
from llama_layers.verify.sites import Site
from llama_layers.verify.suspect import Suspect
from llama_layers.verify.validate import Recorded, first_tokens

# An array whose inputs are not known may differ from the exact one so many times as much as our
# own run in the same dtype does.
DIFFERS = 30.0
# Mistakes are held against so many first tokens, and outputs of a product, before all.
_TOKENS, _OUTPUTS = 8, 64
# A mistake that leaves more than this share of the difference there is held against no more.
_LESS = 0.5
# What a layer that is left out makes of the input of whatever follows it.
_CONSEQUENCE = "input from the wrong place"
# Explanations that leave up to this many times the least difference count as equally good.
_ALIKE = 4.0


@dataclass(frozen=True, eq=False)
class Seen:
    """How far an array is from a recomputation through sites that were not recorded.

    Attributes
    ----------
    site : Site
        Which.
    array : ndarray
        What the port has there.
    formats : Formats
        In which formats it computes.
    inputs : tuple of str
        The recorded sites that it was recomputed from.
    difference : float
        Relative, of the whole array; NaN where nothing was recorded to recompute it from.
    yardstick : float or None
        The same of our own run in the port's dtype.
    odd : bool
        Whether it has NaN or Inf that nothing recorded and no weight accounts for.
    lacks_ids : bool
        Whether it could be recomputed if `input_ids` were recorded.
    """

    site: Site
    array: NDArray[Any]
    formats: Formats
    inputs: tuple[str, ...]
    difference: float
    yardstick: float | None
    odd: bool = False
    lacks_ids: bool = False

    @property
    def allowed(self) -> float:
        """The largest difference that looks like rounding."""
        floor = FLOATS[self.formats.dtype].unit_roundoff
        return DIFFERS * max(self.yardstick or 0.0, floor)

    @property
    def verdict(self) -> Literal["SEEN", "DIFFERS"]:
        """DIFFERS if the difference is larger."""
        if math.isnan(self.difference):
            return "DIFFERS" if self.odd else "SEEN"
        return "SEEN" if self.difference <= self.allowed else "DIFFERS"

    @property
    def note(self) -> str:
        """What this rests on, as a sentence."""
        if not math.isnan(self.difference):
            return (
                "inputs were not recorded, so that only inherited error could be seen, for which "
                "no bound holds"
            )
        if self.odd:
            return "the port has NaN or Inf here, and nothing that it could come from was recorded"
        if self.lacks_ids:
            return "input_ids were not recorded, and it could be recomputed from nothing else"
        return "nothing that it could be recomputed from was recorded"


class Unlocated:
    """Sites whose inputs were not recorded, and what could have gone wrong before them."""

    def __init__(self, recorded: Recorded, model: Llama) -> None:
        self._recorded = recorded
        self._inherited = Inherited(recorded, model)
        self._short = Run(first_tokens(recorded, _TOKENS), model)

    def seen(self, site: Site, array: NDArray[Any], formats: Formats) -> Seen:
        """Hold a site against a recomputation."""
        exact, yardstick, inputs = self._inherited.at(site, formats.dtype)
        if exact is not None:
            apart = _apart(self._recorded, array, exact)
            return Seen(site, array, formats, inputs, apart, yardstick)
        model = self._inherited.run.model
        odd = not _is_finite(self._recorded, site, array) and _weights_are_finite(model, site)
        lacks_ids = self._recorded.input_ids is None and not site.pairwise
        return Seen(site, array, formats, inputs, math.nan, yardstick, odd, lacks_ids)

    def diagnose(
        self, seen: Seen, /, *, only: Collection[str] | None = None
    ) -> tuple[Explanation, ...]:
        """The mistakes whose recomputation the array looks like, the likeliest first.

        Each is made since the recorded arrays, on inputs that are recomputed where they are
        missing: in one operation, or in all that it would be made in.
        """
        if not math.isfinite(seen.difference):
            return ()
        with np.errstate(all="ignore"):
            tried = (*self._known(seen, only), *self._composed(seen, only))
        found = [
            Explanation(name, detail, left / seen.allowed)
            for name, detail, left in tried
            if left <= seen.allowed
        ]
        found.sort(key=lambda e: (e.ratio, e.name == _CONSEQUENCE))
        best: dict[str, Explanation] = {}
        for explanation in found:
            if explanation.ratio <= _ALIKE * found[0].ratio:
                best.setdefault(explanation.name, explanation)
        return tuple(best.values())

    def _known(self, seen: Seen, only: Collection[str] | None) -> Iterator[tuple[str, str, float]]:
        """Mistakes in one operation: the site's own, or one before it whose array is missing."""
        site, model = seen.site, self._inherited.run.model
        filled = self._inherited.filled(site)
        for place in self._inherited.places(site):
            route = filled.route(place)
            assert route is not None  # of what was recomputed, every input is known
            array = seen.array if place is site else filled.array(place.name)
            operation = operation_of(place, route, filled, model)
            suspect = Suspect(place, operation, array, seen.formats, filled, model)
            for hypothesis in HYPOTHESES:
                if hypothesis.kind == Kind.MISTAKE and (only is None or hypothesis.name in only):
                    for change in hypothesis.applied(suspect):
                        left = self._left(seen, place, change.operation)
                        where = "" if place is site else f" That is at {place.name}."
                        yield hypothesis.name, change.detail + where, left

    def _left(self, seen: Seen, place: Site, operation: Computable) -> float:
        """The difference that is left with a mistake in one operation."""
        if place is seen.site:
            if not self._possible(operation, seen):
                return math.inf
            exact = operation.bound(seen.formats).exact
            return _apart(self._recorded, seen.array, exact)
        exact = operation.bound(seen.formats).exact
        return self._left_by(
            seen,
            replace(self._short, tap=_instead(place, exact[:, : self._short.recorded.count])),
            replace(self._inherited.run, tap=_instead(place, exact)),
        )

    def _possible(self, operation: Computable, seen: Seen) -> bool:
        """Whether a mistake survives a look at some tokens and outputs of a product."""
        if not isinstance(operation, Linear) or self._recorded.keep is not None:
            return True
        few = replace(
            operation,
            x=operation.x[:, :_TOKENS],
            weight=operation.weight[:_OUTPUTS],
            bias=None if operation.bias is None else operation.bias[:_OUTPUTS],
        )
        theirs = seen.array[:, :_TOKENS, :_OUTPUTS]
        return self._less(distance(few.bound(seen.formats).exact, theirs), seen)

    def _composed(
        self, seen: Seen, only: Collection[str] | None
    ) -> Iterator[tuple[str, str, float]]:
        """Mistakes in several operations since the recorded arrays."""
        between = self._inherited.between(seen.site)
        mistakes = (composed(run, between) for run in (self._short, self._inherited.run))
        for few, mistake in zip(*mistakes, strict=True):
            if only is None or mistake.name in only:
                yield mistake.name, mistake.detail, self._left_by(seen, few.run, mistake.run)

    def _left_by(self, seen: Seen, short: Run, run: Run) -> float:
        """The difference that a run with a mistake leaves: of some tokens first, then of all."""
        quick = "float64" if seen.formats.dtype == "float64" else "float32"
        array = short.recorded.array(seen.site.name)
        # A token that sees later ones is another without them.
        if run.causal and not self._less(
            _apart(short.recorded, array, computed(short, quick, seen.site)), seen
        ):
            return math.inf
        return _apart(self._recorded, seen.array, computed(run, "float64", seen.site))

    def _less(self, left: float, seen: Seen) -> bool:
        """Whether a mistake leaves so little of the difference that it is worth a closer look."""
        return left <= max(_LESS * seen.difference, seen.allowed)


def _instead(site: Site, array: NDArray[Any]) -> Tap:
    """The tap that puts an array in the place of a site's."""
    return lambda name, right: array.astype(right.dtype) if name == site.name else right


def _apart(recorded: Recorded, array: NDArray[Any], exact: NDArray[np.float64]) -> float:
    """How far apart they are at tokens that are no padding."""
    exact = exact[:, -array.shape[1] :]
    if recorded.keep is None:
        return distance(exact, array)
    keep = recorded.keep[:, -array.shape[1] :]
    return distance(exact[keep], array[keep])


def _is_finite(recorded: Recorded, site: Site, array: NDArray[Any]) -> bool:
    """Whether each number is one that padding and hidden keys have no part in."""
    finite = np.isfinite(array.astype(np.float64))
    if site.pairwise:
        assert site.layer is not None  # pairs are of a layer's tokens
        window = recorded.config.window_of(site.layer)
        finite |= ~recorded.allowed(window)[:, None]
    if recorded.keep is None:
        return bool(finite.all())
    finite = np.swapaxes(finite, 1, 2) if site.pairwise else finite
    return bool(finite[recorded.keep[:, -finite.shape[1] :]].all())


def _weights_are_finite(model: Llama, site: Site) -> bool:
    """Whether every weight that a site is computed with is finite."""
    weights = model.weights
    last = model.config.num_hidden_layers - 1 if site.layer is None else site.layer
    found = [bool(np.isfinite(to_numpy(weights.embed_tokens).astype(np.float32)).all())]
    for layer in range(last + 1):
        arrays = weights.layers[layer].named().values()
        found += [bool(np.isfinite(to_numpy(a).astype(np.float32)).all()) for a in arrays]
    return all(found)
