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
from llama_layers.verify.fit import ROTATED
from llama_layers.verify.look import Sites
from llama_layers.verify.mistakes.rounding import NARROW, are_numbers_of, narrowed
from llama_layers.verify.profiles import profile_named
from llama_layers.verify.report import SiteResult
from llama_layers.verify.report.remedy import Remedy
from llama_layers.verify.validate import Recorded

# So many sites are all tried; of more, three of each role.
_ALL = 64
# How long, in seconds, remedies may be tried.
_TIME = 20.0
# How many remedies are named.
_NAMED = 2
_WRONG = ("FAIL", "DIFFERS")
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
class _Tried:
    """A way to judge sites otherwise."""

    option: str
    change: Callable[[Sites], Sites]
    instead: str = ""


@np.errstate(all="ignore")  # the port may have NaN or Inf
def remedies(
    judged: Sites, results: Sequence[SiteResult], with_layout: Callable[[str], Recorded]
) -> tuple[Remedy, ...]:
    """The options that leave the fewest failing sites, if they leave fewer.

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
    end = time.perf_counter() + _TIME
    judged = replace(judged, asked=replace(judged.asked, explains=False))
    sample = _sample(results)
    failing = sum(result.verdict in _WRONG for result in sample)
    found: dict[str, Remedy] = {}
    for first in _firsts(results):
        for tried in _candidates(judged, first, with_layout):
            if tried.option in found or time.perf_counter() > end:
                continue
            changed, left, count = tried.change(judged), 0, 0
            if changed.look(first.site).result.verdict in _WRONG:
                continue
            for result in sample:
                left += changed.look(result.site).result.verdict in _WRONG
                count += 1
                if time.perf_counter() > end:
                    break
            if left < failing:
                found[tried.option] = Remedy(
                    tried.option, tried.instead, left, failing, count, len(results)
                )
    best = sorted(found.values(), key=lambda remedy: remedy.left)
    return tuple(best[:1] if best and not best[0].left else best[:_NAMED])


def _firsts(results: Iterable[SiteResult]) -> Iterator[SiteResult]:
    """The first failing site of each role."""
    seen = set()
    for result in results:
        if result.verdict in _WRONG and result.site.role not in seen:
            seen.add(result.site.role)
            yield result


def _sample(results: Sequence[SiteResult]) -> list[SiteResult]:
    """Few sites that stand for all, in the order of a forward pass."""
    if len(results) <= _ALL:
        return list(results)
    by_role: dict[str, list[SiteResult]] = {}
    for result in results:
        by_role.setdefault(result.site.role, []).append(result)
    kept: set[str] = set()
    for found in by_role.values():
        wrong = [result for result in found if result.verdict in _WRONG]
        right = [result for result in found if result.verdict not in _WRONG]
        for some in (wrong[:1], wrong[-1:], right[len(right) // 2 :][:1]):
            kept.update(result.site.name for result in some)
    return [result for result in results if result.site.name in kept]


def _candidates(
    judged: Sites, first: SiteResult, with_layout: Callable[[str], Recorded]
) -> Iterator[_Tried]:
    """What may have been meant at a failing site."""
    asked, role = judged.asked, first.site.role
    yield from _other_dtypes(judged, first)
    if role in ROTATED:
        now = judged.recorded.metadata.get("rope_layout", "half")
        other = "half" if now == "interleaved" else "interleaved"
        yield _Tried(
            f"--rope-layout {other}",
            lambda sites: replace(sites, recorded=with_layout(other)),
            f'"rope_layout": "{other}" in the trace\'s metadata',
        )
    yield from _named(judged, first)
    if first.site.operation in ("scores", "softmax", "attention"):
        for narrow in ("float16", "bfloat16"):
            yield _allowing(judged, f"cache={narrow}")
            yield _allowing(judged, f"kv_cache={narrow}")
        if asked.profile is None and asked.accumulate is None and first.dtype == "float32":
            yield _profiled("llama.cpp with flash attention")
    if role in SUMMED and asked.profile is None and first.dtype in NARROW:
        for ranks in (2, 4, 8):
            yield _profiled(f"tensor parallel, {ranks} ranks, {first.dtype} reduce")


def _other_dtypes(judged: Sites, first: SiteResult) -> Iterator[_Tried]:
    """Formats of which all numbers of the array are."""
    array = judged.recorded.array(first.site.name)
    stored = dtype_name(judged.model.weights.embed_tokens.dtype)
    for narrow in (*NARROW, "float32"):
        if FLOATS[narrow].precision >= FLOATS[first.dtype].precision:
            continue
        if not (are_numbers_of(narrow, array) if narrow in NARROW else _are_float32(array)):
            continue

        def change(sites: Sites, narrow: str = narrow) -> Sites:
            return replace(sites, asked=replace(sites.asked, dtype=narrow))

        in_metadata = f'"dtype": "{narrow}" in the trace\'s metadata'
        if FLOATS[narrow].holds(FLOATS[stored]):
            yield _Tried(f"--dtype {narrow}", change, in_metadata)
            continue
        # The command rounds weights to the dtype unless the trace says what they are.
        stated = "weights" in judged.recorded.metadata
        option = f"--dtype {narrow} --weights-dtype {narrow}" if stated else f"--dtype {narrow}"
        model = _rounded(judged.model, narrow)
        yield _Tried(
            option,
            lambda sites, change=change, model=model: replace(change(sites), model=model),  # type: ignore[misc]
            f'in Python dtype="{narrow}", and load(..., dtype="{narrow}")',
        )
        yield _Tried(f"--dtype {narrow} --weights-dtype {stored}", change)


def _are_float32(array: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.array_equal(array.astype(np.float32), array, equal_nan=True))


def _named(judged: Sites, first: SiteResult) -> Iterator[_Tried]:
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
                form = found[1]
                yield _Tried(
                    said,
                    lambda sites, form=form: replace(  # type: ignore[misc]
                        sites, asked=replace(sites.asked, accumulate=form)
                    ),
                    f'"{key}": "{form}" in the trace\'s metadata',
                )
            else:
                model = _rounded(judged.model, found[1])
                yield _Tried(
                    said,
                    lambda sites, model=model: replace(sites, model=model),  # type: ignore[misc]
                    f'in Python load(..., dtype="{found[1]}")',
                )


def _allowing(judged: Sites, roundings: str) -> _Tried:
    every = ",".join(filter(None, (judged.asked.allowed, roundings)))
    return _Tried(
        f"--allow {every}",
        lambda sites: replace(sites, asked=replace(sites.asked, allowed=every)),
    )


def _profiled(name: str) -> _Tried:
    return _Tried(
        f'--profile "{name}"',
        lambda sites: replace(sites, asked=replace(sites.asked, profile=profile_named(name))),
    )


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
            array = weights.layers[int(found[1])].named()[found[2]]
        else:
            array = getattr(weights, name.removeprefix("model.").removesuffix(".weight"))
        return narrowed(to_numpy(array), self._narrow)


def _rounded(model: Llama, narrow: str) -> Llama:
    """A model with its weights rounded to a format."""
    weights = LlamaWeights.from_named(_Narrowed(model, narrow), model.config)
    return replace(model, weights=weights, open_tokenizer=None)
