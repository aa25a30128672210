"""What can be said of each site by itself, before mistakes are looked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, FloatFormat, accumulate_format, dtype_name
from llama_layers.layers.sites import LOGPROBS, Site
from llama_layers.model.llama import Llama
from llama_layers.verify.allowed_roundings import allowing
from llama_layers.verify.bound import Bound
from llama_layers.verify.build import operation_of
from llama_layers.verify.defined import where_defined
from llama_layers.verify.diagnose import diagnose
from llama_layers.verify.distance import distance
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.fit import OF_VOCABULARY
from llama_layers.verify.judge import Judgement, judge
from llama_layers.verify.mistakes.near import worst_alone
from llama_layers.verify.mistakes.rounding import are_numbers_of
from llama_layers.verify.place import place_of
from llama_layers.verify.profiles import (
    CONTRACT,
    LLAMA_CPP,
    PROFILES,
    Rounding,
    RoundingProfile,
)
from llama_layers.verify.ranks import parallel_profile
from llama_layers.verify.report import EDGES, Element, SiteResult, SiteVerdict
from llama_layers.verify.report.wording import counted
from llama_layers.verify.unbounded import Recomputed, Unbounded
from llama_layers.verify.validate import Recorded

# Elements of a site that a report shows.
WORST = 8


@dataclass(frozen=True)
class Look:
    """What is known of a site before mistakes are looked for.

    Attributes
    ----------
    result : SiteResult
        Without explanations.
    unexcused : SiteResult or None
        The result that holds instead if a mistake explains the site without the roundings that
        `result` excuses it by: they would excuse much.
    evidence : FailingSite, Unbounded or None
        What mistakes are to explain; None where it was left behind, to be computed again.
    always : bool
        Whether `unexcused` is to be tried at every such site, and not only where few sites need
        those roundings.
    sites : Sites or None
        Those of one rank, if the look is at its numbers and not at those of the check.
    """

    result: SiteResult
    unexcused: SiteResult | None = None
    evidence: FailingSite | Unbounded | None = field(default=None, repr=False)
    always: bool = False
    sites: Sites | None = field(default=None, repr=False)

    def without_arrays(self) -> Look:
        """The look without evidence that holds a layer's arrays."""
        return replace(self, evidence=None) if isinstance(self.evidence, FailingSite) else self


@dataclass(frozen=True)
class Asked:
    """What a check was asked for.

    Attributes
    ----------
    dtype, accumulate : str or None
        What the port rounds results to, and keeps sums in; as the arrays are, if None.
    profile : RoundingProfile or None
        The engine; every engine's roundings are tried where none is given.
    explains : bool
        Whether to look for mistakes.
    allowed : str
        Roundings that are allowed besides: "cache=float16, scores".
    """

    dtype: str | None
    accumulate: str | None
    profile: RoundingProfile | None
    explains: bool
    allowed: str = ""

    def allowing(self, profile: RoundingProfile) -> RoundingProfile:
        """A profile, with what is allowed besides."""
        return allowing(profile, self.allowed) if self.allowed else profile


@dataclass(frozen=True, eq=False)
class Sites:
    """The recorded sites of a trace, each held against the model by itself."""

    recorded: Recorded
    model: Llama
    asked: Asked

    @cached_property
    def recomputed(self) -> Recomputed:
        """The sites whose inputs were not recorded. Ask in the order of a forward pass."""
        return Recomputed(self.recorded, self.model)

    def look(self, site: Site) -> Look:
        """Hold a recorded site against its bound, or else against a recomputation."""
        evidence = self.evidence(site)
        if isinstance(evidence, Unbounded):
            result = _compared(evidence)
            lacks_past = self.recomputed.exact.lacks_past(site)
            look = Look(replace(result, note=result.note or self._padding(site)), evidence=evidence)
        else:
            look = self.judged(evidence)
            lacks_past = self.recorded.past.needed(site, look.result.inputs)
        result = look.result
        if lacks_past and (result.verdict in ("FAIL", "DIFFERS") or math.isnan(result.difference)):
            return Look(_not_judged(result, self.recorded.past.note))
        return look

    @np.errstate(invalid="ignore")  # the port may have signalling NaN
    def evidence(self, site: Site) -> FailingSite | Unbounded:
        """A recorded site with all that it is held against."""
        array, route = self.recorded.array(site.name), self.recorded.route(site)
        if route is None:
            return self.recomputed.compared(site, array, self._formats(array))
        operation = operation_of(site, route, self.recorded, self.model)
        formats = self._formats(array, route)
        if site.name == LOGPROBS and not are_numbers_of(formats.dtype, array):
            formats = replace(formats, dtype=dtype_name(array.dtype))  # of an engine that rounds
        return FailingSite(site, operation, array, formats, self.recorded, self.model)

    def _formats(self, array: np.ndarray, inputs: Sequence[str] = ()) -> Rounding:
        found, *read = (self._format(a) for a in (array, *map(self.recorded.array, inputs)))
        accumulate = self.asked.accumulate or accumulate_format(found).name
        narrowest = min(read, key=lambda form: form.precision).name if read else None
        profile = self.asked.allowing(self.asked.profile or CONTRACT)
        return Rounding(found.name, accumulate, profile, narrowest)

    def _format(self, array: np.ndarray) -> FloatFormat:
        """The format that an array was rounded to."""
        found = FLOATS[dtype_name(array.dtype)]
        if self.asked.dtype is not None and FLOATS[self.asked.dtype].precision < found.precision:
            return FLOATS[self.asked.dtype]
        return found

    @np.errstate(invalid="ignore")
    def judged(self, failing: FailingSite) -> Look:
        """Hold an array against its bound, without and with the roundings of engines."""
        array, formats = failing.computed, failing.formats
        bound = where_defined(self._bound(failing), failing.site, self.recorded)
        judgement = judge(array, bound)
        theirs = None
        if judgement.verdict != "PASS" and self.asked.profile is None:
            theirs = self._profile_of(failing)
        if theirs is not None and self._is_stated(theirs):
            formats = replace(formats, profile=theirs)
            bound = where_defined(failing.bound(formats), failing.site, self.recorded)
            judgement = judge(array, bound)
        route, ratio = self.recorded.route(failing.site), bound.ratio(array)
        assert route is not None  # or else it is not judged
        failed = SiteResult(
            site=failing.site,
            verdict="FAIL",
            shape=array.shape,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            inputs=route,
            judgement=judgement,
            difference=distance(bound.exact, array),
            histogram=_histogram(ratio),
            note=self._padding(failing.site),
            worst=_worst(array, bound, ratio),
        )
        if judgement.verdict == "FAIL" and (theirs is None or theirs.excess_precision):
            place = place_of(failing.site, array, bound, self.model.config)
            failed = replace(failed, place=place)
        if theirs is None and judgement.verdict == "FAIL":
            return Look(failed, evidence=failing)
        verdict, note = self._remark(failing, judgement, bound, theirs)
        profile = "" if theirs is None else theirs.name
        result = replace(failed, verdict=verdict, note=note, profile=profile, place=None)
        if theirs is None or judgement.verdict != "FAIL":
            return Look(result)
        return Look(result, failed, failing, always=theirs.excess_precision)

    def _bound(self, failing: FailingSite) -> Bound:
        """The bound; where a cache may round, the nearer of those with and without that.

        Tokens of a first chunk are often computed from keys and values that are not in it yet.
        """
        bound, profile = failing.bound(failing.formats), failing.formats.profile
        if profile.cache is None or "cache" not in failing.operation.steps:
            return bound
        other = failing.bound(replace(failing.formats, profile=replace(profile, cache=None)))
        nearer = bound.ratio(failing.computed) <= other.ratio(failing.computed)
        both = ((bound.exact, other.exact), (bound.limit, other.limit), (bound.usual, other.usual))
        return Bound(*(np.where(nearer, first, second) for first, second in both))

    def _remark(
        self,
        failing: FailingSite,
        judgement: Judgement,
        bound: Bound,
        theirs: RoundingProfile | None,
    ) -> tuple[SiteVerdict, str]:
        """The verdict on a site that does not fail, and what there is to say of it."""
        array, formats = failing.computed, failing.formats
        if not np.isfinite(array.astype(np.float64)[~np.isinf(bound.limit)]).all():
            return "WARN", "the port has NaN or Inf here, as what it was given demands"
        if lost := _overflowed(failing):
            return "WARN", f"{counted(lost, 'number')} overflowed {formats.dtype} here"
        if theirs is not None:
            habits = replace(formats, profile=theirs).habits(failing.operation.steps)
            verdict: SiteVerdict = "PASS" if self._is_stated(theirs) else "WARN"
            return verdict, f"rounds as {theirs.name} does: {habits}"
        note = self._unusual(failing, judgement) or self._padding(failing.site)
        return judgement.verdict, note

    def _profile_of(self, failing: FailingSite) -> RoundingProfile | None:
        """The profile whose roundings explain an array."""
        profiles, said = failing.profiles, self.recorded.metadata
        profiles += tuple(own for key, own in LLAMA_CPP.items() if said.get(key) == "yes")
        ranks = parallel_profile(said)
        if ranks is not None and "reduce" in failing.operation.steps:
            profiles = (ranks, *profiles)
        steps = failing.operation.steps
        tried = {failing.formats.profile.rounds(steps)}
        for profile in profiles:
            allowed = self.asked.allowing(profile)
            if (rounds := allowed.rounds(steps)) in tried:
                continue
            tried.add(rounds)
            formats = replace(failing.formats, profile=allowed)
            if not _excuses_worst(failing, formats):
                continue
            bound = where_defined(failing.operation.bound(formats), failing.site, self.recorded)
            if judge(failing.computed, bound).verdict == "PASS":
                return profile
        return None

    def _is_stated(self, profile: RoundingProfile) -> bool:
        """Whether the trace says that it is of an engine that rounds so."""
        engine = self.recorded.metadata.get("engine", "").partition(" ")[0]
        own = [known for known in PROFILES.values() if engine and known.name.startswith(engine)]
        if profile.name == "float32 phases":
            return any(known.phases == profile.phases for known in own)
        return any(known.name == profile.name for known in own)

    def _padding(self, site: Site) -> str:
        """A note on logits that were not looked at."""
        if site.name not in OF_VOCABULARY or not self.recorded.padding:
            return ""
        left_out = counted(self.recorded.padding, "logit")
        return f"{left_out} of each token are beyond the vocabulary, and were left out"

    def _unusual(self, failing: FailingSite, judgement: Judgement) -> str:
        """A note on errors that rounding can explain, but rarely does."""
        if judgement.verdict != "WARN":
            return ""
        if judgement.usual_ratio <= 1:
            return (
                "nothing could be judged: numbers can overflow, or sums have too few bits for a "
                "limit"
            )
        causes = diagnose(failing, usually=True) if self.asked.explains else ()
        said = "rounding can explain it, but errors are larger than usual"
        if not causes:
            return f"{said}: sums in fewer bits than stated, perhaps"
        names = list(dict.fromkeys(cause.name for cause in causes))
        detail = causes[0].detail.removesuffix(".") if len(names) == 1 else ""
        return f"{said}, and like those of {' or '.join(names)}. {detail}".removesuffix(". ")


def _compared(found: Unbounded) -> SiteResult:
    """The result at a site whose inputs were not recorded."""
    return SiteResult(
        site=found.site,
        verdict=found.verdict,
        shape=found.array.shape,
        dtype=found.formats.dtype,
        accumulate=found.formats.accumulate,
        inputs=found.inputs,
        judgement=None,
        difference=found.difference,
        yardstick=found.yardstick,
        note=found.note,
        place=found.place,
    )


def _not_judged(result: SiteResult, note: str) -> SiteResult:
    """The result at a site that the port computed from what is not in the trace."""
    return SiteResult(
        site=result.site,
        verdict="SEEN",
        shape=result.shape,
        dtype=result.dtype,
        accumulate=result.accumulate,
        inputs=(),
        judgement=None,
        difference=math.nan,
        note=note,
    )


def _excuses_worst(failing: FailingSite, formats: Rounding) -> bool:
    """Whether roundings may excuse the worst element, before all of a site is tried."""
    found = worst_alone(failing)
    if found is None:
        return True
    operation, here = found
    ratio = operation.bound(formats).ratio(failing.computed[here])
    return bool(ratio.flat[np.argmax(failing.ratio[here])] <= 1)


def _overflowed(failing: FailingSite) -> int:
    """Count the non-finite values where the exact value is finite and overflow is possible."""
    if failing.site.pairwise:  # hidden keys have no limit either
        return 0
    bound = failing.bound(failing.formats)
    lost = ~np.isfinite(failing.computed) & np.isfinite(bound.exact) & np.isinf(bound.limit)
    return int(np.count_nonzero(lost))


def _histogram(ratio: NDArray[np.float64]) -> tuple[int, ...]:
    edges = np.asarray([-np.inf, *EDGES, np.inf])
    places = np.searchsorted(edges[1:-1], ratio.ravel(), side="left")
    return tuple(int(n) for n in np.bincount(places, minlength=len(EDGES) + 1))


def _worst(array: np.ndarray, bound: Bound, ratio: NDArray[np.float64]) -> tuple[Element, ...]:
    count = min(WORST, ratio.size)
    if not count:
        return ()
    places = np.argpartition(-ratio, count - 1, axis=None)[:count]
    places = places[np.argsort(-ratio.ravel()[places], kind="stable")]
    indices = [np.unravel_index(int(place), ratio.shape) for place in places]
    return tuple(
        Element(tuple(map(int, at)), *(float(y[at]) for y in (array, bound.exact, bound.limit)))
        for at in indices
    )
