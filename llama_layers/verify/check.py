"""A trace held against a model, site by site, from the port's own inputs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial

from llama_layers.arrays.checks import check_choice
from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.errors import shown
from llama_layers.layers.sites import sites
from llama_layers.model.llama import Llama
from llama_layers.verify.allowed_roundings import allowing
from llama_layers.verify.by_rank import named_ranks, settled
from llama_layers.verify.diagnose import diagnose
from llama_layers.verify.diagnose_unbounded import diagnose_unbounded
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.family_roundings import rounding_in_family
from llama_layers.verify.habits import Habits, habits_of, said_of_both, with_mistakes
from llama_layers.verify.jobs import check_executor, looks
from llama_layers.verify.join import JoinedTrace, recorded_by_ranks
from llama_layers.verify.logprob_summary import summary_of_check
from llama_layers.verify.look import Asked, Look, Sites
from llama_layers.verify.mistakes import MISTAKES, Kind
from llama_layers.verify.profiles import CONTRACT, RoundingProfile, profile_named
from llama_layers.verify.rank_order import check_order
from llama_layers.verify.remedies import remedies
from llama_layers.verify.report import Explanation, Remedy, Report, SiteResult
from llama_layers.verify.stored import info_of
from llama_layers.verify.trace import Trace, with_layout
from llama_layers.verify.unknown_names import without_unknown
from llama_layers.verify.validate import Recorded

# For how many seconds mistakes are looked for, and those that were found at more sites.
SECONDS, AGAIN = 30.0, 10.0
# How many sites of one role are diagnosed in vain before half of the time must do for the others.
DIAGNOSED = 3


def check(
    trace: Trace,
    model: Llama,
    /,
    *,
    dtype: str | None = None,
    accumulate: str | None = None,
    profile: str | RoundingProfile | None = None,
    allow: str | None = None,
    rope_layout: str | None = None,
    past: Trace | None = None,
    ignore_unknown: bool = False,
    explain: bool = True,
    progress: Callable[[SiteResult], object] | None = None,
    diagnosing: Callable[[SiteResult], object] | None = None,
    executor: Executor | None = None,
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
    allow : str, optional
        Roundings that are allowed besides those of the profile: names of fields of
        `RoundingProfile`, with a format where one is needed, such as "cache=float16, scores".
    rope_layout : {"half", "interleaved"}, optional
        Whether the two numbers of a pair that RoPE rotates are half a head apart or next to each
        other in the port's queries and keys; by default what the metadata says, or "half".
    past : Trace, optional
        The tokens before those of `trace`, which attention sees through a cache: keys after RoPE
        and values of every layer. A trace may also have them as ``self_attn.past_key`` and
        ``self_attn.past_value``.
    ignore_unknown : bool, optional
        Whether arrays that have no site's name are left out instead of refused.
    explain : bool, optional
        Whether to look for the mistakes that explain a FAIL: at every site that fails and that no
        mistake explains that was found before, for 30 seconds in all.
    progress : callable, optional
        Called with each result as soon as it and all before it are judged. Causes are looked for
        when all are.
    diagnosing : callable, optional
        Called with the result at each site before its cause is looked for.
    executor : concurrent.futures.Executor, optional
        Where layers are judged, each in a job of its own: a `ProcessPoolExecutor`, say, or one of
        Dask or mpi4py. A job is sent the places of files and reads its layer from them, so the
        model should be one that `load` gave, and the trace one from a file; arrays in memory are
        sent along. The report is that of a check without an executor.

    Returns
    -------
    Report
        A result for each recorded site.

    Raises
    ------
    TraceError
        If the trace is of another model, an array has a wrong shape or dtype, no site of the
        model is in it, or traces of ranks were joined in another order than that of the ranks.
    TypeError, ValueError
        If an argument is of a wrong type, a format, profile or rounding is unknown, `dtype` is
        wider than every array, or the model is one rank's part.

    Notes
    -----
    Each bound is for one operation. For errors accumulated over many no useful bound exists: it
    would grow with each layer by the product of norms, and exceed the activations themselves.
    Where the inputs of a site were not recorded, it is recomputed through all sites since those
    that were, and its difference is held against that of our own run in the same dtype; that is
    experience, not a bound.

    Where ``logprobs`` and `input_ids` were recorded, the report also says how far they are from
    those of a float64 pass, in nats, how far our own run in the port's dtype is from it, and how
    much each recorded site adds.

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
    if model.weights.group is not None:
        raise ValueError("model: expected a whole model, got the part of it that one rank has")
    if rope_layout is not None:
        check_choice("rope_layout", rope_layout, "half", "interleaved")
    for name, value in (("dtype", dtype), ("accumulate", accumulate)):
        if value is not None and not (isinstance(value, str) and value in FLOATS):
            raise ValueError(f"{name}: expected one of {', '.join(FLOATS)}, got {shown(value)}")
    check_executor(executor)
    chosen = None if profile is None else profile_named(profile)
    if isinstance(profile, str) and chosen is not None:
        chosen = rounding_in_family(chosen, model.config.model_type)
    allowed = CONTRACT if chosen is None else chosen
    if allow is not None:
        allowed = allowing(allowed, allow)
    given = trace
    if ignore_unknown:
        trace = without_unknown(trace, model.config)
        past = None if past is None else without_unknown(past, model.config)
    if rope_layout is not None:
        trace = with_layout(trace, rope_layout)
    recorded = recorded_by_ranks(trace, model.config, past)
    if dtype is not None:
        _check_dtype(dtype, recorded)
    dtype = dtype or recorded.metadata.get("dtype")
    accumulate = accumulate or recorded.metadata.get("accumulate")
    judged = Sites(recorded, model, Asked(dtype, accumulate, chosen, explain, allow or ""))
    if isinstance(trace, JoinedTrace):
        if chosen is not None and chosen.ranks not in (1, trace.size):
            raise ValueError(
                f"profile: expected {trace.size} ranks, one for each trace, got {chosen.ranks}"
            )
        check_order(trace, judged)
        trace, judged = settled(trace, judged)
    found = looks(judged, executor)
    if isinstance(trace, JoinedTrace):
        found = named_ranks(trace, judged, found)
    seen = []
    for look in found:
        seen.append(look.without_arrays())
        if progress is not None:
            progress(look.result)
    again = replace(judged)  # whose recomputation begins at the first layer once more
    results = _Diagnosis(again, habits_of(seen), diagnosing).results(seen)
    meant: tuple[Remedy, ...] = ()
    if explain and any(result.verdict in ("FAIL", "DIFFERS", "WARN") for result in results):
        meant = remedies(
            judged,
            results,
            lambda layout: recorded_by_ranks(with_layout(trace, layout), model.config, past),
        )
    return Report(
        results=tuple(results),
        missing=tuple(
            site.name
            for site in sites(model.config)
            if not site.optional and site.name not in recorded.arrays
        ),
        metadata=dict(given.metadata),
        seconds=time.perf_counter() - start,
        profile=allowed.name,
        weights=dtype_name(model.weights.embed_tokens.dtype),
        diagnosed=explain,
        remedies=meant,
        logprobs=summary_of_check(judged),
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
class _Diagnosis:
    """What explains sites, one after the other: a mistake is made in one layer as in another."""

    sites: Sites
    habits: Habits
    told: Callable[[SiteResult], object] | None
    _until: float = field(default_factory=lambda: time.perf_counter() + SECONDS)
    _causes: dict[str, list[Explanation]] = field(default_factory=dict)  # by role
    _in_vain: Counter[str] = field(default_factory=Counter)

    def results(self, seen: Sequence[Look]) -> list[SiteResult]:
        """The results at all sites, with the mistakes that explain them."""
        return [self._result(look) for look in seen]

    def _result(self, look: Look) -> SiteResult:
        result = look.result
        explains = self.sites.asked.explains
        if look.unexcused is not None:
            if not look.always and not (explains and self.habits.is_rare(result)):
                return self._beside_a_habit(look) if explains else result
            if found := self._explanations(look, strictly=True):
                found = found if explains else ()
                return said_of_both(replace(look.unexcused, explanations=found), result.note)
            return self.habits.remarked(result)
        if result.verdict in ("FAIL", "DIFFERS") and explains:
            found = self._explanations(look)
            if found is None:
                said = "there was no time to look for what explains it"
                return replace(result, note=f"{result.note}; {said}" if result.note else said)
            stopped = not found and time.perf_counter() > self._until
            return replace(result, explanations=found, stopped=SECONDS if stopped else None)
        return result

    def _beside_a_habit(self, look: Look) -> SiteResult:
        """The result at a site that a habit excuses, with formulas that explain the first such."""
        result = look.result
        if not self.habits.is_first(result) or time.perf_counter() > self._until:
            return result
        if self.told is not None:
            self.told(result)
        formulas = {mistake.name for mistake in MISTAKES if mistake.kind == Kind.FORMULA}
        found = self._diagnosis(look, strictly=True)(only=formulas, until=self._until)
        return replace(result, explanations=found, note=with_mistakes(result.note, found))

    def _explanations(
        self, look: Look, *, strictly: bool = False
    ) -> tuple[Explanation, ...] | None:
        """Mistakes that explain a site: those that explained others of its role, or else any.

        None if there was no time to look for them.
        """
        role = f"{look.result.site.role} {strictly}"
        known = self._causes.setdefault(role, [])
        left = self._until - time.perf_counter()
        late = left < (0 if self._in_vain[role] < DIAGNOSED else SECONDS / 2)
        if late and (left < -AGAIN or not known):
            return None
        if self.told is not None:
            self.told(look.result)
        diagnosis = self._diagnosis(look, strictly)
        again = diagnosis(only={cause.name for cause in known}) if known else ()
        if again or late:
            return again
        found = diagnosis(until=self._until)
        self._in_vain[role] += not found
        known.extend(found)
        return found

    def _diagnosis(self, look: Look, strictly: bool) -> Callable[..., tuple[Explanation, ...]]:
        judged = look.sites or self.sites
        evidence = look.evidence or judged.evidence(look.result.site)
        if isinstance(evidence, FailingSite):
            return partial(diagnose, evidence, strictly=strictly)
        return partial(diagnose_unbounded, evidence, judged.recorded, judged.model)
