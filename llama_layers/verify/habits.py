"""Roundings that an engine makes on purpose, counted: it makes them in each layer, or in none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llama_layers.verify.look import Look
from llama_layers.verify.report import Explanation, SiteResult

# A habit that shows at less than this share of the sites of a role may be none.
_RARELY = 0.25
# With fewer sites than that, nothing is said.
_SITES = 4


@dataclass(frozen=True)
class Habits:
    """At how many sites of each role a profile's roundings show, of how many."""

    shown: Counter[tuple[str, str]]  # by role and profile
    of: Counter[str]  # by role
    first: dict[tuple[str, str], str]  # the first site of each role that a profile excuses

    def is_first(self, result: SiteResult) -> bool:
        """Whether a site is the first of its role that its profile excuses, unless stated."""
        key = result.site.role, result.profile
        return result.verdict == "WARN" and self.first.get(key) == result.site.name

    def is_rare(self, result: SiteResult) -> bool:
        """Whether a habit that excuses a site shows at few others of its role, and of no other."""
        role, profile = result.site.role, result.profile
        count = self.of[role]
        if count < _SITES or self.shown[role, profile] >= _RARELY * count:
            return False
        others = {other for other, name in self.shown if name == profile and other != role}
        return all(self.shown[other, profile] < _RARELY * self.of[other] for other in others)

    def remarked(self, result: SiteResult) -> SiteResult:
        """The result with a remark, where a habit that excuses it is rare."""
        if not self.is_rare(result):
            return result
        role = result.site.role
        said = f"which shows at {self.shown[role, result.profile]} of {self.of[role]} such sites"
        return replace(result, note=f"{result.note}; {said}")


def habits_of(looks: Iterable[Look]) -> Habits:
    """Count at which sites which profile is needed."""
    shown: Counter[tuple[str, str]] = Counter()
    of: Counter[str] = Counter()
    first: dict[tuple[str, str], str] = {}
    for look in looks:
        role = look.result.site.role
        of[role] += look.result.judgement is not None
        if look.result.profile:
            shown[role, look.result.profile] += 1
            first.setdefault((role, look.result.profile), look.result.site.name)
    return Habits(shown, of, first)


def with_mistakes(note: str, found: Sequence[Explanation]) -> str:
    """A remark on a habit, and the mistakes that explain the site as well."""
    if not found:
        return note
    names = " or ".join(dict.fromkeys(cause.name for cause in found))
    detail = found[0].detail.removesuffix(".")
    return f"{note}; a mistake would explain it as well: {names}. {detail}"


def said_of_both(result: SiteResult, habit: str) -> SiteResult:
    """A result with the mistakes that explain it, and the habit that does so as well."""
    said = f"it may also be no mistake: {habit}"
    return replace(result, note=f"{result.note}; {said}" if result.note else said)
