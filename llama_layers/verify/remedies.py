"""Options of a check that allow what a port may do on purpose, each tried before it is named.

A mistake and a choice can look the same: arrays rounded to bfloat16, heads whose rotated pairs are
neighbours, a cache in float16. For each way to allow what fails, some sites are judged once more.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.arrays.transfer import to_numpy
from llama_layers.model.llama import Llama
from llama_layers.model.tensor_names import expected_tensors
from llama_layers.model.weights import LlamaWeights
from llama_layers.parallel.plan import SUMMED
from llama_layers.verify.family_roundings import rounding_in_family
from llama_layers.verify.fit import ROTATED
from llama_layers.verify.look import Sites
from llama_layers.verify.mistakes.rounding import NARROW, are_numbers_of, narrowed
from llama_layers.verify.profiles import PARALLEL, PROFILES, profile_named
from llama_layers.verify.ranks import parallel_profile
from llama_layers.verify.report import SiteResult
from llama_layers.verify.report.remedy import Remedy
from llama_layers.verify.validate import Recorded

# So many sites are all tried; of more, three of each role.
_ALL = 64
# How long, in seconds, remedies may be tried.
_TIME = 20.0
# The options from the one that allows least.
_ORDER = "--weights-dtype --rope-layout --allow --dtype --accumulate --profile"
_FAILS = ("FAIL", "DIFFERS")
# What a mistake's name says, and the option that allows it; {} is the format.
_OPTIONS = {
    r"sums kept in (\w+)": ("--accumulate {}", "accumulate"),
    r"RoPE phases in (\w+)": ("--allow phases={}", ""),
    r"RoPE table in (\w+)": ("--allow rope_table={}", ""),
    r"(?:attention )?scores (?:rounded to|in) (\w+)": ("--allow scores={}", ""),
    r"probabilities (?:rounded to|in) (\w+)": ("--allow probabilities={}", ""),
    r"weights rounded to (\w+)": ("--weights-dtype {}", "weights"),
}


@dataclass(frozen=True)
class _Candidate:
    """A way to judge sites otherwise."""

    option: str
    change: Callable[[Sites], Sites]
    instead: str = ""


@np.errstate(all="ignore")  # the port may have NaN or Inf
def remedies(
    judged: Sites, results: Sequence[SiteResult], with_layout: Callable[[str], Recorded]
) -> tuple[Remedy, ...]:
    """The options that leave the fewest failing sites, or warnings if none fails.

    Parameters
    ----------
    judged : Sites
        The sites of a trace.
    results : sequence of SiteResult
        What became of them, with explanations.
    with_layout : callable
        Gives the trace with its heads read in a RoPE layout.

    Returns
    -------
    tuple of Remedy
        The best first; none if nothing helps.
    """
    judged = replace(judged, asked=replace(judged.asked, explains=False))
    trial = _Trial(judged, results, time.perf_counter() + _TIME)
    if not trial.failing:
        names = dict.fromkeys(result.profile for result in results if result.profile)
        engines = [name for name in names if name in PROFILES]
        parallel = [name for name in names if name.startswith(PARALLEL)]
        both = [f"{engine}, {ranks}" for engine in engines for ranks in parallel]
        candidates = [_profiled(name) for name in (*engines, *parallel, *both)]
        best = _best((trial.tried(candidate), candidate) for candidate in candidates)
        return () if best is None else (best[0],)
    best = _best(_tries(trial, results, with_layout))
    if best is None:
        return ()
    remedy, candidate = best
    if remedy.left:
        changed = candidate.change(judged)
        some = _sample(results, _FAILS)
        still = [r for r in some if changed.look(r.site).result.verdict in _FAILS]
        further = _best(_tries(trial.after(changed), still, with_layout))
        if further is not None and further[0].left < remedy.left:
            return (_both(remedy, further[0]),)
    return (remedy,)


def _both(first: Remedy, then: Remedy) -> Remedy:
    """An option, and another that was tried with it."""
    allow = "--allow "
    options = [first.option, then.option]
    if first.option.startswith(allow) and then.option.startswith(allow):
        options = [then.option]  # which has what the first allows
    instead = "; ".join(filter(None, (first.instead, then.instead)))
    return replace(then, option=" ".join(options), instead=instead)


def _tries(
    trial: _Trial, results: Sequence[SiteResult], with_layout: Callable[[str], Recorded]
) -> Iterator[_Tried]:
    """Every way to allow the first failing site of a role, and what it leaves."""
    failing = [r for r in _sample(results, _FAILS) if r.verdict in _FAILS]
    helped = set()
    for first in _firsts(results):
        for candidate in _candidates(trial.judged, first, failing, with_layout):
            if candidate.option not in helped:
                remedy = trial.tried(candidate, first)
                helped.update([candidate.option] if remedy else [])
                yield remedy, candidate


def _best(tried: Iterable[_Tried]) -> tuple[Remedy, _Candidate] | None:
    """The one that leaves least; of two that leave as much, the one that allows less."""
    helpful = [(remedy, candidate) for remedy, candidate in tried if remedy is not None]
    return min(helpful, key=lambda pair: (pair[0].left, _allows(pair[1].option)), default=None)


def _allows(option: str) -> int:
    """How much an option allows; ranks that add round nothing but sums."""
    if option.startswith(f'--profile "{PARALLEL}'):
        option = "--allow reduce"
    return _ORDER.split().index(option.partition(" ")[0])


_Tried = tuple[Remedy | None, _Candidate]


class _Trial:
    """Sites judged once more: some, and then all if there is time."""

    def __init__(self, judged: Sites, results: Sequence[SiteResult], end: float) -> None:
        self.judged, self._results, self._end = judged, results, end
        self.failing = any(result.verdict in _FAILS for result in results)
        self._wrong = _FAILS if self.failing else (*_FAILS, "WARN")

    def after(self, changed: Sites) -> _Trial:
        """The same, with an option that is taken already."""
        return _Trial(changed, self._results, self._end)

    def tried(self, candidate: _Candidate, first: SiteResult | None = None) -> Remedy | None:
        """What an option leaves; None if it does not help, first of all at one site."""
        start = time.perf_counter()
        changed = candidate.change(self.judged)
        if start > self._end or (first is not None and self._left(changed, [first])):
            return None
        some = _sample(self._results, self._wrong)
        left = self._left(changed, some)
        found = self._remedy(candidate, left, some)
        each = (time.perf_counter() - start) / len(some)
        in_time = time.perf_counter() + each * len(self._results) < self._end
        if found is not None and found.tried < found.sites and self.failing and in_time:
            left = self._left(candidate.change(self.judged), self._results)
            return self._remedy(candidate, left, self._results)
        return found

    def _remedy(
        self, candidate: _Candidate, left: Sequence[SiteResult], some: Sequence[SiteResult]
    ) -> Remedy | None:
        """What an option leaves of some sites; None if it does not help.

        A site that stands for many that pass must not fail with it.
        """
        failing = sum(result.verdict in self._wrong for result in some)
        trades = any(result.verdict not in self._wrong for result in left)
        if len(left) >= failing or (trades and len(some) < len(self._results)):
            return None
        of = "failing site" if self.failing else "warning"
        counts = (len(left), failing, len(some), len(self._results))
        return Remedy(candidate.option, candidate.instead, *counts, of)

    def _left(self, changed: Sites, some: Iterable[SiteResult]) -> list[SiteResult]:
        """The sites that are wrong with an option, as they are without it."""
        return [r for r in some if changed.look(r.site).result.verdict in self._wrong]


def _firsts(results: Iterable[SiteResult]) -> Iterator[SiteResult]:
    """The first failing site of each role."""
    seen = set()
    for result in results:
        if result.verdict in _FAILS and result.site.role not in seen:
            seen.add(result.site.role)
            yield result


def _sample(results: Sequence[SiteResult], wrongs: Sequence[str]) -> list[SiteResult]:
    """Few sites that stand for all, in the order of a forward pass."""
    if len(results) <= _ALL:
        return list(results)
    by_role: dict[str, list[SiteResult]] = {}
    for result in results:
        by_role.setdefault(result.site.role, []).append(result)
    kept: set[str] = set()
    for found in by_role.values():
        wrong = [result for result in found if result.verdict in wrongs]
        right = [result for result in found if result.verdict not in wrongs]
        for some in (wrong[:1], wrong[-1:], right[len(right) // 2 :][:1]):
            kept.update(result.site.name for result in some)
    return [result for result in results if result.site.name in kept]


def _candidates(
    judged: Sites,
    first: SiteResult,
    failing: Sequence[SiteResult],
    with_layout: Callable[[str], Recorded],
) -> Iterator[_Candidate]:
    """What may have been meant at a failing site; some that fail tell what is the same in all."""
    asked, role = judged.asked, first.site.role
    yield from _other_dtypes(judged, [first, *failing])
    if role in ROTATED:
        now = judged.recorded.metadata.get("rope_layout", "half")
        other = "half" if now == "interleaved" else "interleaved"
        yield _Candidate(
            f"--rope-layout {other}",
            lambda sites: replace(sites, recorded=with_layout(other)),
            f'"rope_layout": "{other}" in the trace\'s metadata',
        )
    yield from _named(judged, first)
    if asked.accumulate is None and first.dtype == "float64":
        yield _accumulating("float32")
    if first.site.operation in ("scores", "softmax", "attention"):
        for narrow in ("float16", "bfloat16"):
            yield _allowing(judged, f"cache={narrow}")
            yield _allowing(judged, f"kv_cache={narrow}")
        if asked.profile is None and asked.accumulate is None and first.dtype == "float32":
            yield _profiled("llama.cpp with flash attention")
    if asked.profile is None:
        yield from _reduces(judged, first)


def _reduces(judged: Sites, first: SiteResult) -> Iterator[_Candidate]:
    """Formats that ranks may have added partial sums in, for sums and for what is made of parts."""
    recorded, inputs = judged.recorded, first.inputs
    if first.site.role in SUMMED:
        array = recorded.array(first.site.name)
        formats = [narrow for narrow in NARROW if are_numbers_of(narrow, array)]
    elif any(name in recorded.parts for name in inputs):
        formats = [*NARROW]
    else:
        return
    stated = parallel_profile(recorded.metadata)
    for ranks in (2, 4, 8) if stated is None else (stated.ranks,):
        for narrow in formats:
            yield _profiled(f"{PARALLEL}{ranks} ranks, {narrow} reduce")


def _other_dtypes(judged: Sites, failing: Sequence[SiteResult]) -> Iterator[_Candidate]:
    """Formats of which all numbers of the array are, and of most arrays that fail."""
    stored = dtype_name(judged.model.weights.embed_tokens.dtype)
    for narrow in (*NARROW, "float32"):
        if FLOATS[narrow].precision >= FLOATS[failing[0].dtype].precision:
            continue
        told = [_are_of(narrow, judged.recorded.array(result.site.name)) for result in failing]
        if not told[0] or sum(told) < 0.75 * len(told):
            continue

        def change(sites: Sites, narrow: str = narrow) -> Sites:
            return replace(sites, asked=replace(sites.asked, dtype=narrow))

        in_metadata = f'"dtype": "{narrow}" in the trace\'s metadata'
        if FLOATS[narrow].holds(FLOATS[stored]):
            yield _Candidate(f"--dtype {narrow}", change, in_metadata)
            continue
        # The command rounds weights to the dtype unless the trace says what they are.
        stated = "weights" in judged.recorded.metadata
        option = f"--dtype {narrow} --weights-dtype {narrow}" if stated else f"--dtype {narrow}"
        model = _rounded(judged.model, narrow)
        yield _Candidate(
            option,
            lambda sites, change=change, model=model: replace(change(sites), model=model),  # type: ignore[misc]
            f'in Python dtype="{narrow}", and load(..., dtype="{narrow}")',
        )
        yield _Candidate(f"--dtype {narrow} --weights-dtype {stored}", change)


def _are_of(form: str, array: np.ndarray) -> bool:
    """Whether all numbers of an array are those of a narrower format."""
    if form in NARROW:
        return are_numbers_of(form, array)
    return bool(np.array_equal(array.astype(np.float32), array, equal_nan=True))


def _named(judged: Sites, first: SiteResult) -> Iterator[_Candidate]:
    """What allows the mistakes that explain a site."""
    for explanation in first.explanations:
        for pattern, (option, key) in _OPTIONS.items():
            found = re.fullmatch(pattern, explanation.name)
            if found is None or found[1] not in FLOATS:
                continue
            said = option.format(found[1])
            if option.startswith("--allow "):
                yield _allowing(judged, said.removeprefix("--allow "))
            elif key == "accumulate":
                yield _accumulating(found[1])
            else:
                model = _rounded(judged.model, found[1])
                yield _Candidate(
                    said,
                    lambda sites, model=model: replace(sites, model=model),  # type: ignore[misc]
                    f'in Python load(..., dtype="{found[1]}")',
                )


def _allowing(judged: Sites, roundings: str) -> _Candidate:
    name = roundings.partition("=")[0]
    others = judged.asked.allowed.split(",") if judged.asked.allowed else []
    others = [one.strip() for one in others if one.partition("=")[0].strip() != name]
    every = ",".join([*others, roundings])
    return _Candidate(
        f"--allow {every}",
        lambda sites: replace(sites, asked=replace(sites.asked, allowed=every)),
    )


def _accumulating(form: str) -> _Candidate:
    return _Candidate(
        f"--accumulate {form}",
        lambda sites: replace(sites, asked=replace(sites.asked, accumulate=form)),
        f'"accumulate": "{form}" in the trace\'s metadata',
    )


def _profiled(name: str) -> _Candidate:
    def change(sites: Sites) -> Sites:
        profile = rounding_in_family(profile_named(name), sites.model.config.model_type)
        return replace(sites, asked=replace(sites.asked, profile=profile))

    return _Candidate(f'--profile "{name}"', change)


class _Narrowed(Mapping[str, np.ndarray]):
    """A model's tensors by name, rounded to a format when they are used."""

    def __init__(self, model: Llama, narrow: str) -> None:
        self._model, self._narrow = model, narrow
        self._names = list(expected_tensors(model.config))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        weights = self._model.weights
        if (found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)) is not None:
            array = weights.layers[int(found[1])].named(self._model.config.model_type)[found[2]]
        else:
            array = getattr(weights, name.removeprefix("model.").removesuffix(".weight"))
        return narrowed(to_numpy(array), self._narrow)


def _rounded(model: Llama, narrow: str) -> Llama:
    """A model with its weights rounded to a format."""
    weights = LlamaWeights.from_named(_Narrowed(model, narrow), model.config)
    return replace(model, weights=weights, open_tokenizer=None)
