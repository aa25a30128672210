"""A trace held against a model, site by site, from the port's own inputs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, FloatFormat, accumulate_format, dtype_name
from llama_layers.layers.sites import Site, sites
from llama_layers.model.llama import Llama
from llama_layers.verify.bound import Bound
from llama_layers.verify.build import operation_of
from llama_layers.verify.defined import where_defined
from llama_layers.verify.diagnose import diagnose
from llama_layers.verify.diagnose_unbounded import diagnose_unbounded
from llama_layers.verify.distance import distance
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.fit import HEAD
from llama_layers.verify.judge import Judgement, judge
from llama_layers.verify.profiles import (
    CONTRACT,
    PROFILES,
    Rounding,
    RoundingProfile,
    profile_named,
)
from llama_layers.verify.report import EDGES, Element, Explanation, Report, SiteResult, SiteVerdict
from llama_layers.verify.report.wording import counted
from llama_layers.verify.stored import info_of
from llama_layers.verify.trace import Trace
from llama_layers.verify.unbounded import Recomputed
from llama_layers.verify.validate import Recorded, validated

# Elements of a site that a report shows.
WORST = 8
# How many sites of one role are diagnosed, if what explained the first does not explain them.
DIAGNOSED = 3


def check(
    trace: Trace,
    model: Llama,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    profile: str | RoundingProfile | None = None,
    explain: bool = True,
    progress: Callable[[SiteResult], object] | None = None,
) -> Report:
    r"""Hold each recorded site against what it should be.

    A site is recomputed in float64 from the arrays that the port itself recorded for its inputs,
    so that nothing inherited counts, and compared element by element with the bound on the
    rounding error of that one operation.

    Parameters
    ----------
    trace : Trace
        The port's arrays.
    model : Llama
        The model, with the weights that the port computed with: a port that rounds them to
        bfloat16 is held against ``load(..., dtype="bfloat16")``.
    dtype : str, optional
        The format that the port rounds results to, where that is narrower than its arrays are; by
        default what the trace's metadata says, or the dtype of each array.
    accumulate : str, optional
        The format that the port keeps sums in; by default what the metadata says, or float32
        (float64 for float64 results).
    profile : str or RoundingProfile, optional
        The engine whose further roundings are allowed, "transformers" for one, or roundings of
        your own. By default none is; a site that an engine's explain is a WARN with its name.
    explain : bool, optional
        Whether to look for the mistakes that explain a FAIL.
    progress : callable, optional
        Called with each result as soon as it is known.

    Returns
    -------
    Report
        A result for each recorded site.

    Raises
    ------
    TraceError
        If the trace is of another model, an array has a wrong shape or dtype, or no site of the
        model is in it.
    TypeError, ValueError
        If an argument is of a wrong type, a format or profile is unknown, `dtype` is wider than
        every array, or the model is one rank's part.

    Notes
    -----
    Each bound is for one operation. For errors accumulated over many no useful bound exists: it
    would grow with each layer by the product of norms, and exceed the activations themselves.
    Where the inputs of a site were not recorded, it is recomputed through all sites since those
    that were, and its difference is held against that of our own run in the same dtype; that is
    experience, not a bound.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import load
    >>> from llama_layers.verify import check, record
    >>> model = load("smollm2-135m")  # doctest: +SKIP
    >>> trace = record(model, np.array([[1, 2, 3]]))  # doctest: +SKIP
    >>> check(trace, model).agrees  # doctest: +SKIP
    True
    """
    start = time.perf_counter()
    if isinstance(model, Llama) and model.weights.group is not None:
        raise ValueError("model: expected a whole model, got the part of it that one rank has")
    if not isinstance(model, Llama):
        raise TypeError(f"model: expected a Llama, got {type(model).__name__}")
    recorded = validated(trace, model.config)
    chosen = None if profile is None else profile_named(profile)
    for name, value in (("dtype", dtype), ("accumulate", accumulate)):
        if value is not None and value not in FLOATS:
            raise ValueError(f"{name}: expected one of {', '.join(FLOATS)}, got {value!r}")
    if dtype is not None:
        _check_dtype(dtype, recorded)
    checker = _Checker(recorded, model, dtype, accumulate, chosen, explain)
    results = []
    for result in checker.results():
        results.append(result)
        if progress is not None:
            progress(result)
    return Report(
        results=tuple(results),
        missing=tuple(
            site.name
            for site in sites(model.config)
            if not site.pairwise and site.name not in recorded.arrays
        ),
        metadata=dict(trace.metadata),
        seconds=time.perf_counter() - start,
        profile=(chosen or CONTRACT).name,
        weights=dtype_name(model.weights.embed_tokens.dtype),
        diagnosed=explain,
    )


def _check_dtype(dtype: str, recorded: Recorded) -> None:
    """Refuse a format that no array can have been rounded from."""
    found = (FLOATS[info_of(recorded.arrays, name).dtype] for name in recorded.arrays)
    widest = max(found, key=lambda form: form.precision)
    if FLOATS[dtype].precision > widest.precision:
        raise ValueError(
            f"dtype: expected what the port rounds results to, no wider than its arrays, which are "
            f"{widest.name}, got {dtype}"
        )


@dataclass
class _Checker:
    """The results of all sites, one after the other; a layer's arrays are read when it is due."""

    recorded: Recorded
    model: Llama
    dtype: str | None
    accumulate: str | None
    profile: RoundingProfile | None  # every engine's is tried where none is given
    explains: bool

    def __post_init__(self) -> None:
        self._dtype = self.dtype or self.recorded.metadata.get("dtype")
        self._accumulate = self.accumulate or self.recorded.metadata.get("accumulate")
        self._causes: dict[str, list[Explanation]] = {}  # by role
        self._diagnosed: Counter[str] = Counter()
        self._recomputed = Recomputed(self.recorded, self.model)

    def results(self) -> Iterator[SiteResult]:
        for site in sites(self.model.config):
            if site.name in self.recorded.arrays:
                route = self.recorded.route(site)
                if route is None:
                    yield self._unbounded(site)
                else:
                    yield self._judged(site, route)

    def _formats(self, array: np.ndarray, inputs: Sequence[str] = ()) -> Rounding:
        found, *read = (self._format(a) for a in (array, *map(self.recorded.array, inputs)))
        accumulate = self._accumulate or accumulate_format(found).name
        narrowest = min(read, key=lambda form: form.precision).name if read else None
        return Rounding(found.name, accumulate, self.profile or CONTRACT, narrowest)

    def _format(self, array: np.ndarray) -> FloatFormat:
        """The format that an array was rounded to."""
        found = FLOATS[dtype_name(array.dtype)]
        if self._dtype is not None and FLOATS[self._dtype].precision < found.precision:
            return FLOATS[self._dtype]
        return found

    @np.errstate(invalid="ignore")  # the port may have signalling NaN
    def _judged(self, site: Site, route: tuple[str, ...]) -> SiteResult:
        array = self.recorded.array(site.name)
        formats = self._formats(array, route)
        operation = operation_of(site, route, self.recorded, self.model)
        failing = FailingSite(site, operation, array, formats, self.recorded, self.model)
        bound = where_defined(failing.bound(formats), site, self.recorded)
        judgement = judge(array, bound)
        verdict: SiteVerdict = judgement.verdict
        note = ""
        theirs: RoundingProfile | None = None
        explanations: tuple[Explanation, ...] = ()
        if verdict != "PASS" and self.profile is None:
            theirs, explanations = self._as_profile(failing)
            if theirs is not None:
                habits = theirs.habits(operation.steps, formats.narrower)
                verdict, note = "WARN", f"rounds as {theirs.name} does: {habits}"
        judged = ~np.isinf(bound.limit)
        if verdict != "FAIL" and not np.isfinite(array.astype(np.float64)[judged]).all():
            verdict, note = "WARN", "the port has NaN or Inf here, as what it was given demands"
        elif verdict != "FAIL" and (lost := _overflowed(failing)):
            verdict, note = "WARN", f"{counted(lost, 'number')} overflowed {formats.dtype} here"
        if verdict == "FAIL" and self.explains:
            explanations = explanations or self._diagnosis(site, partial(diagnose, failing))
        return SiteResult(
            site=site,
            verdict=verdict,
            shape=array.shape,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            inputs=route,
            judgement=judgement,
            difference=distance(bound.exact, array),
            note=note or self._unusual(failing, judgement, verdict) or self._padding(site),
            profile="" if theirs is None else theirs.name,
            histogram=_histogram(bound.ratio(array)),
            worst=_worst(array, bound),
            explanations=explanations if self.explains else (),
        )

    def _as_profile(
        self, failing: FailingSite
    ) -> tuple[RoundingProfile | None, tuple[Explanation, ...]]:
        """The profile whose roundings explain the array; or mistakes that explain it better."""
        profiles = failing.formats.profiles
        if self.recorded.metadata.get("flash_attention") == "yes":  # as `record_llama_cpp` says
            profiles += (PROFILES["llama.cpp with flash attention"],)
        for profile in profiles:
            bound = failing.operation.bound(replace(failing.formats, profile=profile))
            bound = where_defined(bound, failing.site, self.recorded)
            if judge(failing.computed, bound).verdict == "PASS":
                strictly = partial(diagnose, failing, strictly=True)
                # Unrounded inputs excuse much: what explains without them is what it was.
                if profile.excess_precision and (
                    found := self._diagnosis(failing.site, strictly, "strictly")
                ):
                    return None, found
                return profile, ()
        return None, ()

    def _diagnosis(
        self, site: Site, diagnosis: Callable[..., tuple[Explanation, ...]], how: str = ""
    ) -> tuple[Explanation, ...]:
        """Mistakes that explain a site: those that explained others of its role, or else any."""
        role = f"{site.role} {how}"
        known = self._causes.setdefault(role, [])
        again = diagnosis(only={cause.name for cause in known}) if known else ()
        if again or self._diagnosed[role] >= DIAGNOSED:
            return again
        self._diagnosed[role] += 1
        found = diagnosis()
        known.extend(found)
        return found

    def _unusual(self, failing: FailingSite, judgement: Judgement, verdict: SiteVerdict) -> str:
        """A note on errors that rounding can explain, but rarely does."""
        if verdict != "WARN":
            return ""
        if judgement.usual_ratio <= 1:
            return (
                "nothing could be judged: numbers can overflow, or sums have too few bits for a "
                "limit"
            )
        causes = diagnose(failing, usually=True) if self.explains else ()
        said = "rounding can explain it, but errors are larger than usual"
        if not causes:
            return f"{said}: sums in fewer bits than stated, perhaps"
        names = list(dict.fromkeys(cause.name for cause in causes))
        detail = causes[0].detail.removesuffix(".") if len(names) == 1 else ""
        return f"{said}, and like those of {' or '.join(names)}. {detail}".removesuffix(". ")

    def _padding(self, site: Site) -> str:
        """A note on logits that were not looked at."""
        if site.name != HEAD or not self.recorded.padding:
            return ""
        left_out = counted(self.recorded.padding, "logit")
        return f"{left_out} of each token are beyond the vocabulary, and were left out"

    @np.errstate(invalid="ignore")
    def _unbounded(self, site: Site) -> SiteResult:
        """The result at a site whose inputs were not recorded."""
        array = self.recorded.array(site.name)
        found = self._recomputed.compared(site, array, self._formats(array))
        explanations: tuple[Explanation, ...] = ()
        if found.verdict == "DIFFERS" and self.explains:
            walk, model = self._recomputed.exact, self.model
            diagnosis = partial(diagnose_unbounded, found, self.recorded, walk, model)
            explanations = self._diagnosis(site, diagnosis)
        return SiteResult(
            site=site,
            verdict=found.verdict,
            shape=array.shape,
            dtype=found.formats.dtype,
            accumulate=found.formats.accumulate,
            inputs=found.inputs,
            judgement=None,
            difference=found.difference,
            yardstick=found.yardstick,
            note=found.note or self._padding(site),
            explanations=explanations,
        )


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


def _worst(array: np.ndarray, bound: Bound) -> tuple[Element, ...]:
    ratio = bound.ratio(array)
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
