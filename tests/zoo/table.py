"""The table of what check found: generated, for docs/evidence/zoo.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.zoo.registry import MISTAKES, seen
from tests.zoo.run import VIEWS, Found
from tests.zoo.variants import VARIANTS, Variant

GRADES = ("right", "near", "none", "wrong")
_NAMED = " | ".join(f"{'no' if grade == 'none' else grade} name" for grade in GRADES)
_HEAD = """---
orphan: true
---

# A zoo of mistakes

Mistakes of ports, collected from public bug reports before they were tried, are planted in a NumPy
port that shares no arithmetic with the package (`tests/zoo/`). `python -m tests.zoo` checks each
and writes this page. A name counts as right if it describes what was planted, as a stranger reads
it; as near, if it points at it and leaves something out. Mistakes that change no element by more
than rounding does in a format are left out there. In float16 and from layers' outputs every fourth
is tried, from logits every eighth.
"""
_HALVES = """## Names added after half of the list was read

At first no name was written by anyone who had read the list. Then half of it was read, chosen by a
checksum of the names, and names were added for what had none. From the other half, 20 mistakes
count as seen, too: 19 whose results were read along with them, and one that was discussed. Only the
unseen ones measure how well a mistake is named that nobody thought of.
"""


def page(found: Sequence[Found], alarms: Iterable[tuple[Variant, list[str]]]) -> str:
    """The page, in Markdown."""
    wrong = [(variant, sites) for variant, sites in alarms if sites]
    lines = [_HEAD, *_summary(found), "", *_halves(found), "", "## Correct variants", ""]
    lines.append(
        f"{len(VARIANTS)} correct ports compute in another order, in blocks, with other formulas, "
        f"in other formats, or are split among ranks. {len(wrong) or 'None'} of them failed."
    )
    lines += ["", *(f"- {v.name} in {v.dtype}: {', '.join(sites)}" for v, sites in wrong)]
    return "\n".join([*lines, "", "## Mistakes", "", *_rows(found), ""])


def _halves(found: Sequence[Found]) -> list[str]:
    """The names of mistakes that were read before names were added, and of the others."""
    lines = [_HALVES, f"| recorded | | mistakes | {_NAMED} |"]
    lines.append("|---|---|--:|" + "--:|" * len(GRADES))
    for view in VIEWS:
        for said, read in (("seen", True), ("unseen", False)):
            here = [one for one in found if one.view == view and seen(one.mistake) is read]
            if here:
                grades = Counter(one.grade for one in here)
                shares = (f"{grades[g]} ({100 * grades[g] / len(here):.3g} %)" for g in GRADES)
                lines.append(
                    f"| {_said(view)} | {said} | {len(here)} | " + " | ".join(shares) + " |"
                )
    return lines


def _said(view: str) -> str:
    return f"all sites, {view}" if view in ("float32", "bfloat16", "float16") else view


def _summary(found: Sequence[Found]) -> list[str]:
    lines = [
        f"| recorded | mistakes | right first site | {_NAMED} |",
        "|---|--:|--:|" + "--:|" * len(GRADES),
    ]
    for view in VIEWS:
        here = [one for one in found if one.view == view]
        if not here:
            continue
        grades = Counter(one.grade for one in here)
        cells = [len(here), sum(one.at_right_site for one in here)]
        cells += [grades[grade] for grade in GRADES]
        shares = [f"{n} ({100 * n / len(here):.3g} %)" for n in cells[1:]]
        lines.append(f"| {_said(view)} | {len(here)} | " + " | ".join(shares) + " |")
    return lines


def _rows(found: Sequence[Found]) -> list[str]:
    views = [view for view in VIEWS if any(one.view == view for one in found)]
    by = {(one.mistake, one.view): one for one in found}
    lines = ["| planted | first wrong site | " + " | ".join(views) + " |"]
    lines.append("|---|---|" + "---|" * len(views))
    for name, mistake in MISTAKES.items():
        if any((name, view) in by for view in views):
            cells = [_cell(by.get((name, view))) for view in views]
            text = f"`{name}`: {mistake.text}"
            lines.append(f"| {text} | `{mistake.first}` | " + " | ".join(cells) + " |")
    return lines


def _cell(found: Found | None) -> str:
    if found is None:
        return ""
    if not found.first:
        return "not found"
    at = "" if found.at_right_site else f" at `{found.first}`, not `{found.expected}`"
    place = f" ({found.place})" if found.place and found.grade == "none" else ""
    names = "" if not found.names else ": " + "; ".join(dict.fromkeys(found.names))
    return f"{found.grade}{names}{place}{at}"
