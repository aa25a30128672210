"""docs/evidence/mutation.md: what became of the mutants, and why some survive."""

from __future__ import annotations

import difflib
import json
import platform
import shlex
import sys
import tomllib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EXPLAINED = Path(__file__).parent / "explained.toml"
PAGE = ROOT / "docs" / "evidence" / "mutation.md"
TOOLS = ("cosmic-ray", "coverage", "pytest", "hypothesis", "numpy")
SURVIVING = ("survived", "not executed")
KEY = ("file", "function", "line", "operator", "occurrence")

HEAD = """\
---
orphan: true
---

# Mutants that survived

[cosmic-ray](https://cosmic-ray.readthedocs.io) changes the source at one place, and the tests that
execute this place should fail. `python tests/mutation/run.py` draws the same number of mutants for
each file, and more for the layers and for what judges a port (`tests/mutation/cosmic-ray.toml`). It
runs the tests that execute the changed statement, the nearest first, and stops at the first
failure, or after five seconds of tests. What survives is tried again in a second run, for 40
seconds, with the tests that were written for it. It writes this page. The last run, of {mutants}
mutants in {files} files, took {seconds:.1f} seconds for each on a machine that did other work, too:

```sh
python tests/mutation/{arguments}
```

{versions}.

- **Killed**: a test fails; "later" says for how many only in the second run.
- **Timeout**: the tests do not end within eight times their usual time and half a minute.
- **Explained**: no test fails, and the table below says why the change does no harm.

| Package | Files | Mutants | Killed | later | Timeout | Explained | Not explained |
| --- | --- | --- | --- | --- | --- | --- | --- |
{counts}

| Where | Survivor | Why |
| --- | --- | --- |
{survivors}
"""


def change(old: str, new: str) -> str:
    """The lines that a change takes out and puts in, on one line."""
    lines = list(difflib.ndiff(old.splitlines(), new.splitlines()))
    out, put = (
        " ".join(line[2:].strip() for line in lines if line.startswith(mark)) for mark in "-+"
    )
    return f"`{out}` becomes `{put}`"


def results(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The last result of each mutant, and whether it had survived."""
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        result = json.loads(line)
        key = tuple(result[name] for name in KEY)
        if (before := last.get(key)) is not None:
            result["seconds"] += before["seconds"]
        result["later"] = before is not None
        last[key] = result
    return last


def explained() -> dict[str, str]:
    """Why survivors do no harm."""
    reasons: dict[str, str] = tomllib.loads(EXPLAINED.read_text())
    return reasons


def name(result: dict[str, Any]) -> str:
    """A mutant's name in explained.toml."""
    return f"{result['file']}: {result['function'] or 'module'}: {result['change']}"


def write(all_results: list[dict[str, Any]]) -> None:
    """Write the page."""
    reasons = explained()
    rooms: dict[str, list[dict[str, Any]]] = {}
    for result in all_results:
        rooms.setdefault("/".join(result["file"].split("/")[:2]), []).append(result)
    survivors = [result for result in all_results if result["outcome"] in SURVIVING]
    versions = [
        f"Python {platform.python_version()}",
        *(f"{tool} {version(tool)}" for tool in TOOLS),
    ]
    counts = [row(*room, reasons) for room in rooms.items()] + [row("all", all_results, reasons)]
    text = HEAD.format(
        mutants=len(all_results),
        files=len({result["file"] for result in all_results}),
        seconds=sum(result["seconds"] for result in all_results) / len(all_results),
        arguments=shlex.join(["run.py", *(a for a in sys.argv[1:] if a != "--measured")]),
        versions=", ".join(versions),
        counts="\n".join(counts),
        survivors="\n".join(survivor(one, reasons) for one in sorted(survivors, key=name)),
    )
    PAGE.write_text(text)


def row(package: str, of_package: list[dict[str, Any]], reasons: dict[str, str]) -> str:
    """What became of a package's mutants."""
    outcomes = Counter(result["outcome"] for result in of_package)
    survivors = sum(outcomes[outcome] for outcome in SURVIVING)
    why = sum(name(one) in reasons for one in of_package if one["outcome"] in SURVIVING)
    cells = (
        package,
        len({result["file"] for result in of_package}),
        len(of_package),
        outcomes["killed"],
        sum(one["later"] for one in of_package if one["outcome"] == "killed"),
        outcomes["timeout"],
        why,
        survivors - why,
    )
    return f"| {' | '.join(map(str, cells))} |"


def survivor(result: dict[str, Any], reasons: dict[str, str]) -> str:
    """A mutant that survived, and why."""
    missing = "**Not explained.**"
    if result["outcome"] == "not executed":
        missing = "**No test executes it.**"
    where = f"{result['file']}: {result['function'] or 'module'}"
    shown = result["change"].replace("|", r"\|")
    return f"| {where} | {shown} | {reasons.get(name(result), missing)} |"
