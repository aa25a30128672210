"""A trace held against a model, site by site, from the port's own inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.dtypes import FLOATS, accumulate_format, dtype_name
from llama_layers.llama import Llama
from llama_layers.verify.bounds import Bound
from llama_layers.verify.build import operation_of
from llama_layers.verify.defined import where_defined
from llama_layers.verify.diagnose import diagnose
from llama_layers.verify.distance import distance
from llama_layers.verify.inherited import Inherited
from llama_layers.verify.judge import Judgement, judge
from llama_layers.verify.operations import Formats
from llama_layers.verify.personas import CONTRACT, PERSONAS, Persona, persona_named
from llama_layers.verify.report import EDGES, Element, Explanation, Report, SiteResult, SiteVerdict
from llama_layers.verify.sites import Site, sites
from llama_layers.verify.suspect import Suspect
from llama_layers.verify.trace import Trace
from llama_layers.verify.validate import Recorded, validated

# Elements of a site that a report shows.
WORST = 8
# An array whose inputs are not known may differ from the exact one so many times as much as our
# own run in the same dtype does.
DIFFERS = 30.0
# How many sites of one role are diagnosed, if what explained the first does not explain them.
DIAGNOSED = 3


def check(
    trace: Trace,
    model: Llama,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    persona: str | Persona | None = None,
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
        What the port computed.
    model : Llama
        The model, with the weights that the port computed with: a port that rounds them to
        bfloat16 is held against ``load(..., dtype="bfloat16")``.
    dtype : str, optional
        The format that the port rounds results to; by default what the trace's metadata says, or
        the dtype of each array.
    accumulate : str, optional
        The format that the port keeps sums in; by default what the metadata says, or float32
        (float64 for float64 results).
    persona : str or Persona, optional
        The engine whose further roundings are allowed, "transformers" for one, or roundings of
        your own. By default none is; a site that an engine's explain is a WARN with its name.
    explain : bool, optional
        Whether to look for the mistakes that explain a FAIL.
    progress : callable, optional
        What is called with each result as soon as it is known.

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
        If an argument is of a wrong type, or a format or persona is unknown.

    Notes
    -----
    Each bound is for one operation. For errors accumulated over many no useful bound exists: it
    would grow with each layer by the product of norms, and exceed the activations themselves.
    Where the inputs of a site were not recorded, it is recomputed through all sites since those
    that were, and its difference is held against that of our own run in the same dtype; that is
    an experience, and no bound.

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
    if not isinstance(model, Llama):
        raise TypeError(f"model: expected a Llama, got {type(model).__name__}")
    recorded = validated(trace, model.config)
    chosen = None if persona is None else persona_named(persona)
    for name, value in (("dtype", dtype), ("accumulate", accumulate)):
        if value is not None and value not in FLOATS:
            raise ValueError(f"{name}: expected one of {', '.join(FLOATS)}, got {value!r}")
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
        persona=(chosen or CONTRACT).name,
        weights=dtype_name(model.weights.embed_tokens.dtype),
        diagnosed=explain,
    )


class _Checker:
    """The results of all sites, one after the other; a layer's arrays are read when it is due."""

    def __init__(
        self,
        recorded: Recorded,
        model: Llama,
        dtype: str | None,
        accumulate: str | None,
        persona: Persona | None,
        explains: bool,
    ) -> None:
        self._recorded = recorded
        self._model = model
        self._dtype = dtype or recorded.metadata.get("dtype")
        self._accumulate = accumulate or recorded.metadata.get("accumulate")
        self._persona = persona or CONTRACT
        self._tries_personas = persona is None
        self._explains = explains
        self._explained: dict[str, list[Explanation]] = {}  # by role
        self._diagnosed: dict[str, int] = {}
        self._inherited = Inherited(recorded, model)

    def results(self) -> Iterator[SiteResult]:
        for site in sites(self._model.config):
            if site.name in self._recorded.arrays:
                route = self._recorded.route(site)
                if route is None:
                    yield self._seen(site)
                else:
                    yield self._judged(site, route)

    def _formats(self, array: NDArray[Any]) -> Formats:
        found = FLOATS[dtype_name(array.dtype)]
        if self._dtype is not None and FLOATS[self._dtype].precision < found.precision:
            found = FLOATS[self._dtype]
        return Formats(found.name, self._accumulate or accumulate_format(found).name, self._persona)

    def _judged(self, site: Site, route: tuple[str, ...]) -> SiteResult:
        array = self._recorded.array(site.name)
        formats = self._formats(array)
        operation = operation_of(site, route, self._recorded, self._model)
        suspect = Suspect(site, operation, array, formats, self._recorded, self._model)
        bound = where_defined(suspect.bound(formats), site, self._recorded)
        judgement = judge(array, bound)
        verdict: SiteVerdict = judgement.verdict
        note = ""
        if verdict != "PASS" and self._tries_personas:
            explained = self._as_persona(suspect)
            if explained is not None:
                verdict, note = "WARN", explained
        judged = ~np.isinf(bound.limit)
        if verdict != "FAIL" and not np.isfinite(array.astype(np.float64)[judged]).all():
            verdict, note = "WARN", "the port has NaN or Inf here, as what it was given demands"
        explanations: tuple[Explanation, ...] = ()
        if verdict == "FAIL" and self._explains:
            explanations = self._diagnosis(suspect)
        return SiteResult(
            site=site,
            verdict=verdict,
            shape=array.shape,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            inputs=route,
            judgement=judgement,
            difference=distance(bound.exact, array),
            note=note or _unusual(judgement, verdict),
            histogram=_histogram(bound.ratio(array)),
            worst=_worst(array, bound),
            explanations=explanations,
        )

    def _as_persona(self, suspect: Suspect) -> str | None:
        """What to say where an engine's own roundings explain the array."""
        for persona in PERSONAS.values():
            bound = suspect.operation.bound(replace(suspect.formats, persona=persona))
            theirs = where_defined(bound, suspect.site, self._recorded)
            if judge(suspect.computed, theirs).verdict == "PASS":
                habits = persona.habits(suspect.operation, suspect.formats.dtype)
                return f"rounds as {persona.name} does: {habits}"
        return None

    def _diagnosis(self, suspect: Suspect) -> tuple[Explanation, ...]:
        role = suspect.site.role
        known = self._explained.setdefault(role, [])
        again = diagnose(suspect, only={explanation.name for explanation in known})
        if again or self._diagnosed.get(role, 0) >= DIAGNOSED:
            return again
        self._diagnosed[role] = self._diagnosed.get(role, 0) + 1
        found = diagnose(suspect)
        known.extend(found)
        return found

    def _seen(self, site: Site) -> SiteResult:
        """What can be said where the inputs of a site were not recorded."""
        array = self._recorded.array(site.name)
        formats = self._formats(array)
        exact, yardstick, inputs = self._inherited.at(site, formats.dtype)
        verdict: SiteVerdict = "SEEN"
        if exact is None:
            difference = math.nan
            note = "nothing that it could be recomputed from was recorded"
        else:
            difference = self._distance(array, exact)
            floor = FLOATS[formats.dtype].unit_roundoff
            if not difference <= DIFFERS * max(yardstick or 0.0, floor):
                verdict = "DIFFERS"
            note = (
                "inputs were not recorded, so that only inherited error could be seen, for which "
                "no bound holds"
            )
        return SiteResult(
            site=site,
            verdict=verdict,
            shape=array.shape,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            inputs=inputs,
            judgement=None,
            difference=difference,
            yardstick=yardstick,
            note=note,
        )

    def _distance(self, array: NDArray[Any], exact: NDArray[np.float64]) -> float:
        """How far apart they are at tokens that are no padding."""
        if self._recorded.keep is None:
            return distance(exact, array)
        keep = self._recorded.keep[:, -array.shape[1] :]
        return distance(exact[keep], array[keep])


def _unusual(judgement: Judgement, verdict: str) -> str:
    if verdict != "WARN":
        return ""
    if judgement.usual_ratio > 1:
        return (
            "rounding can explain it, but errors are larger than usual: sums in fewer bits than "
            "stated, perhaps"
        )
    return "nothing could be judged: numbers can overflow, or sums have too few bits for a limit"


def _histogram(ratio: NDArray[np.float64]) -> tuple[int, ...]:
    edges = np.asarray([-np.inf, *EDGES, np.inf])
    places = np.searchsorted(edges[1:-1], ratio.ravel(), side="left")
    return tuple(int(n) for n in np.bincount(places, minlength=len(EDGES) + 1))


def _worst(array: NDArray[Any], bound: Bound) -> tuple[Element, ...]:
    ratio = bound.ratio(array)
    count = min(WORST, ratio.size)
    if not count:
        return ()
    places = np.argpartition(-ratio, count - 1, axis=None)[:count]
    places = places[np.argsort(-ratio.ravel()[places], kind="stable")]
    indices = [np.unravel_index(int(place), ratio.shape) for place in places]
    return tuple(
        Element(
            tuple(int(i) for i in index),
            float(array[index]),
            float(bound.exact[index]),
            float(bound.limit[index]),
        )
        for index in indices
    )
