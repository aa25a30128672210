"""The table of what was found of each mistake in each family: for docs/evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.families.configs import CONFIGS
from tests.families.run import MISTAKES, Found

GRADES = ("right", "near", "none", "wrong")
_HEAD = """---
orphan: true
---

# Mistakes in each family

Each mistake of `tests/support/mistakes` that can be made in a family is made in a port of it: plain
NumPy in float32, with the family's switches on (`tests/families/port.py`), which shares no
arithmetic with the package. `check` must find the site where it was made, and no other, and say
what it is. A name counts as near if another comes before it, and as wrong if it is not among
those that are said. Left out is what cannot be made in a family, since it has no such step or
weight, and what changes nothing by more than rounding does.

`python -m tests.families` tries them all, in half an hour of one core, and writes this page;
`--part 3/11` tries one of eleven parts, each with every mistake in some families.
"""


def page(tried: int, found: Sequence[Found], alarms: Iterable[str]) -> str:
    """The page, in Markdown; `tried` counts pairs of a mistake and a family."""
    families = {one.family for one in found}
    false = sorted(alarms)
    lines = [
        _HEAD,
        f"Of {len(MISTAKES) * len(CONFIGS):,} pairs of a mistake and a family, {tried:,} were "
        f"tried for this page, in {len(families)} families. {len(found):,} of them could be made.",
        "",
        f"{len(false) or 'None'} of the {len(CONFIGS)} ports without a mistake failed"
        + (f": {', '.join(false)}." if false else "."),
        "",
        *_table("family", [(family, _of_family(found, family)) for family in CONFIGS], found),
        "",
        "## By mistake",
        "",
        "Those that do not have the right name in each family where they were tried:",
        "",
        *_mistakes(found),
        "",
    ]
    return "\n".join(lines)


def _of_family(found: Sequence[Found], family: str) -> list[Found]:
    return [one for one in found if one.family == family]


def _table(title: str, rows: list[tuple[str, list[Found]]], found: Sequence[Found]) -> list[str]:
    heads = " | ".join(f"{'no' if grade == 'none' else grade} name" for grade in GRADES)
    lines = [f"| {title} | made | right site | {heads} |", "|---|--:|--:|" + "--:|" * len(GRADES)]
    lines += [f"| {name} | {_cells(of)} |" for name, of in rows if of]
    return [*lines, f"| **all** | {_cells(found)} |"]


def _cells(found: Sequence[Found]) -> str:
    grades = Counter(one.grade for one in found)
    numbers = [sum(one.located for one in found), *(grades[grade] for grade in GRADES)]
    shares = (f"{n} ({100 * n / len(found):.3g} %)" if n else "0" for n in numbers)
    return " | ".join([str(len(found)), *shares])


def _mistakes(found: Sequence[Found]) -> list[str]:
    lines = ["| mistake | families | right name | elsewhere |", "|---|--:|--:|---|"]
    for name in dict.fromkeys(one.mistake for one in sorted(found, key=lambda f: f.number)):
        here = [one for one in found if one.mistake == name]
        wrong = [one for one in here if one.grade != "right" or not one.located]
        if wrong:
            said = "; ".join(dict.fromkeys(map(_said, wrong)))
            lines.append(f"| {name} | {len(here)} | {len(here) - len(wrong)} | {said} |")
    return lines


def _said(one: Found) -> str:
    names = " and ".join(f'"{name}"' for name in one.names) or "no name"
    place = "" if one.located else f", at {', '.join(one.failing) or 'no site'}"
    return f"{one.family}: {names}{place}"
