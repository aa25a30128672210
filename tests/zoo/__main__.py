"""Check every mistake and variant of the zoo, and write the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.zoo.registry import MISTAKES
from tests.zoo.run import VIEWS, Found, alarms, every, findings, variants
from tests.zoo.table import page
from tests.zoo.variants import VARIANTS


def found_of(name: str, views: tuple[str, ...]) -> list[Found]:
    """What check says of one mistake."""
    return list(findings(MISTAKES[name], views))


def alarms_of(number: int) -> list[str]:
    """The false alarms of one variant."""
    return alarms(VARIANTS[number])


def mapped(jobs: int, do: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """Map in processes, or here."""
    if jobs == 1:
        return list(map(do, *arguments))
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(do, *arguments, chunksize=4))


def main() -> None:
    """Run what was asked for; without `--only` and `--dtype` the table may be written."""
    parser = argparse.ArgumentParser("python -m tests.zoo", description=__doc__)
    parser.add_argument("--dtype", choices=VIEWS, help="what is recorded; by default each")
    parser.add_argument("--only", default="", help="mistakes and variants whose names hold this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--write", type=Path, help="the file of the table")
    given = parser.parse_args()
    views = (given.dtype,) if given.dtype else VIEWS
    names = [mistake.name for mistake in every(given.only)]
    chosen = variants(given.only)
    numbers = [VARIANTS.index(variant) for variant in chosen]
    found = [
        one for some in mapped(given.jobs, found_of, names, [views] * len(names)) for one in some
    ]
    text = page(found, zip(chosen, mapped(given.jobs, alarms_of, numbers), strict=True))
    if given.write is not None:
        given.write.write_text(text)
        text = text.partition("## Mistakes")[0]
    print(text)
    for one in found:
        if one.grade in ("wrong", "missed") or not one.at_right_site:
            print(f"{one.grade}: {one.mistake}, {one.view}: {one.first or 'passed'}: {one.names}")
    print(f"{sum(one.seconds for one in found):.0f} s of processor time in check")


if __name__ == "__main__":
    main()
