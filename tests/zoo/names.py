"""Whether a name that check gave describes the mistake that was planted, as a stranger reads it.

Names are judged by what they mean for the numbers at hand, so one mistake may have several right
names. NAMES.md has, for each mistake, a pattern of right names and one of names that are near: they
point at the place or the kind, and leave something out. Anything else is wrong.
"""

from __future__ import annotations

import re
from pathlib import Path

PATTERNS: dict[str, tuple[str, str]] = {
    name: (right.replace("/", "|"), near.replace("/", "|"))
    for line in Path(__file__).with_name("NAMES.md").read_text().splitlines()
    if (found := re.fullmatch(r"- `(\w+)`: ([^;]+)(?:; near: (.+))?", line))
    for name, right, near in [found.groups("")]
}


def judged(mistake: str, names: tuple[str, ...]) -> str:
    """The grade of the names at the first wrong site: "right", "near", "none" or "wrong".

    The first name counts. If only a later one, among those that fit as well, is right, it is near.
    """
    if not names:
        return "none"
    right, near = PATTERNS[mistake]
    if _fits(right, names[0]):
        return "right"
    later = any(_fits(right, name) for name in names[1:])
    return "near" if later or _fits(near, names[0]) else "wrong"


def _fits(pattern: str, name: str) -> bool:
    return bool(pattern) and re.search(pattern, name, re.IGNORECASE) is not None
