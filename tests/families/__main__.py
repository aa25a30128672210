"""Make each mistake in each family, and write the page of what `check` says of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.families.configs import CONFIGS
from tests.families.page import page
from tests.families.run import Found, found, report_of, share

_PAGE = Path(__file__).parents[2] / "docs/evidence/family_mistakes.md"
_RESULTS = Path(__file__).parents[2] / "build/family_mistakes.jsonl"


def tried(part: int, of: int) -> None:
    """Add what is said of a part to the results."""
    _RESULTS.parent.mkdir(exist_ok=True)
    with _RESULTS.open("a") as results:
        for family, number in share(part, of):
            one = found(family, number)
            results.write(json.dumps([family, number, one and asdict(one)]) + "\n")


def _read(one: dict[str, Any]) -> Found:
    """What was written as JSON, which has no tuples."""
    return Found(**{key: tuple(v) if isinstance(v, list) else v for key, v in one.items()})


def main() -> None:
    """Try one part or all, and write the page of all results so far."""
    parser = argparse.ArgumentParser("python -m tests.families", description=__doc__)
    parser.add_argument("--part", default="0/1", help="which of how many parts; all by default")
    parser.add_argument("--keep", action="store_true", help="keep the results of other parts")
    given = parser.parse_args()
    if not given.keep:
        _RESULTS.unlink(missing_ok=True)
    part, _, of = given.part.partition("/")
    tried(int(part), int(of))
    rows = [json.loads(line) for line in _RESULTS.read_text().splitlines()]
    made = [_read(one) for _, _, one in rows if one is not None]
    alarms = [family for family in CONFIGS if not report_of(family).agrees]
    _PAGE.write_text(page(len(rows), made, alarms))
    print(_PAGE.read_text().partition("## By mistake")[0])


if __name__ == "__main__":
    main()
