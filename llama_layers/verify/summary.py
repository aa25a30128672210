"""The sites of a model by role: one line for what is the same in every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

from llama_layers.verify.report import SiteResult

T = TypeVar("T")


@dataclass(frozen=True)
class RoleSummary:
    """What a check found at the sites of one role.

    Attributes
    ----------
    role : str
        Theirs.
    counts : mapping of str to int
        How many have which verdict.
    worst : SiteResult or None
        The one with the largest error over its limit, of those that fail if some do; None if none
        has a limit.
    usual : SiteResult or None
        The one with the largest error over what is usual.
    farthest : SiteResult or None
        Of those without a limit, the one with the largest difference; None if all have one.
    """

    role: str
    counts: Mapping[str, int]
    worst: SiteResult | None
    usual: SiteResult | None
    farthest: SiteResult | None


def by_role(results: Iterable[SiteResult]) -> list[RoleSummary]:
    """A summary for each role, in the order of a forward pass."""
    return [_summary(role, found) for role, found in grouped(results, _role).items()]


def grouped(values: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """The values of each key, in the order in which the keys first come."""
    groups: dict[Any, list[T]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return groups


def _role(result: SiteResult) -> str:
    return result.site.role


def _summary(role: str, results: Sequence[SiteResult]) -> RoleSummary:
    judged = [(result.judgement, result) for result in results if result.judgement is not None]
    others = [result for result in results if result.judgement is None]
    return RoleSummary(
        role,
        Counter(result.verdict for result in results),
        max(judged, key=lambda p: (p[1].verdict == "FAIL", p[0].ratio), default=(None, None))[1],
        max(judged, key=lambda pair: pair[0].usual_ratio, default=(None, None))[1],
        max(others, key=_distance, default=None),
    )


def _distance(result: SiteResult) -> float:
    return result.difference if result.difference == result.difference else -1.0  # NaN is unknown


def layer_ranges(layers: Iterable[int]) -> str:
    """Numbers of layers in few words: 0-3, 7."""
    numbers = sorted(set(layers))
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
