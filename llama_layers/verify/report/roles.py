"""The sites of a model by role: one line for what is the same in every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llama_layers.verify.report.results import SiteResult
from llama_layers.verify.report.wording import grouped


@dataclass(frozen=True)
class RoleSummary:
    """What a check found at the sites of one role.

    Attributes
    ----------
    role : str
        The role.
    counts : mapping of str to int
        How many sites have which verdict.
    worst : SiteResult or None
        The site with the largest error over its limit, of those that fail if some do; None if no
        site has a limit.
    usual : SiteResult or None
        The site with the largest error over what is usual.
    farthest : SiteResult or None
        Of the sites without a limit, the one with the largest difference; None if all have one.
    histogram : tuple of int
        The sites' histograms, added up; empty if no site has one.
    """

    role: str
    counts: Mapping[str, int]
    worst: SiteResult | None
    usual: SiteResult | None
    farthest: SiteResult | None
    histogram: tuple[int, ...]


def by_role(results: Iterable[SiteResult]) -> list[RoleSummary]:
    """Summarise each role, in the order of a forward pass."""
    roles = grouped(results, lambda result: result.site.role)
    return [_summary(role, found) for role, found in roles.items()]


def _summary(role: str, results: Sequence[SiteResult]) -> RoleSummary:
    judged = [(result.judgement, result) for result in results if result.judgement is not None]
    others = [result for result in results if result.judgement is None]
    histograms = [result.histogram for result in results if result.histogram]
    return RoleSummary(
        role,
        Counter(result.verdict for result in results),
        max(judged, key=lambda p: (p[1].verdict == "FAIL", p[0].ratio), default=(None, None))[1],
        max(judged, key=lambda pair: pair[0].usual_ratio, default=(None, None))[1],
        max(others, key=_distance, default=None),
        tuple(sum(counts) for counts in zip(*histograms, strict=True)),
    )


def _distance(result: SiteResult) -> float:
    return result.difference if result.difference == result.difference else -1.0  # NaN is unknown
