"""Change the source at random places, and list the changes that no test notices.

``python tests/mutation/run.py`` needs ``pip install cosmic-ray==8.7.0 coverage`` and hours. It
works on a copy of the project, draws a sample of mutants for each package, and runs for each only
the tests that execute the changed line. It writes docs/evidence/mutation.md from what survives:
explain each survivor in explained.toml, or write the test that kills it.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, WorkResult
from coverage import Coverage, CoverageData

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "mutation"
CONFIG = tomllib.loads((Path(__file__).parent / "cosmic-ray.toml").read_text())["cosmic-ray"]
EXPLAINED = Path(__file__).parent / "explained.toml"
PAGE = ROOT / "docs" / "evidence" / "mutation.md"
ENVIRONMENT = {
    "HYPOTHESIS_PROFILE": "planted",  # without making failures small
    "LLAMA_LAYERS_FAST": "0",  # compiled bodies are not what is changed
    "PYTHONPATH": str(COPY),
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}


class Tests(NamedTuple):
    """Which tests execute which lines of which file."""

    of_lines: dict[Path, dict[int, list[str]]]
    breadth: Counter[str]
    """How many files of the package each test executes: the fewer, the nearer it is to a line."""

    def of(self, mutation: MutationSpec) -> list[str]:
        """The tests that execute a mutated statement, the nearest first.

        What runs when the file is imported is for all tests of the file.
        """
        lines = self.of_lines.get(mutation.module_path, {})
        found = {test for line in statement(mutation) for test in lines.get(line, ()) if test}
        found = found or {test for tests in lines.values() for test in tests if test}
        return sorted(found, key=lambda test: (self.breadth[test], test))


def statement(mutation: MutationSpec) -> range:
    """The lines of the statement, or of the head of the block, that is mutated."""
    line = mutation.start_pos[0]
    tree = ast.parse(mutation.module_path.read_text())
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line)
    ]
    inner = max(around, key=lambda node: node.lineno)
    body = getattr(inner, "body", None)
    end = body[0].lineno - 1 if body and body[0].lineno > line else inner.end_lineno or line
    return range(inner.lineno, end + 1)


def annotated(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file begin and end: nothing evaluates them."""
    spans = []
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("annotation", "returns"):
            if (part := getattr(node, field, None)) is not None:
                spans.append(
                    ((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset))
                )
    return spans


def copied() -> None:
    """Make the copy anew, with all that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    shutil.rmtree(COPY, ignore_errors=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)


def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Let coverage note which test executes a line: this file is a pytest plugin, too."""
    measurement = Coverage.current()
    assert measurement is not None
    measurement.switch_context(item.nodeid.partition("[")[0])


def measured(tests: list[str]) -> Tests:
    """Run the tests once, and see which lines each of them executes."""
    command = shlex.split(CONFIG["test-command"])
    command[command.index("tests") : command.index("tests") + 1] = tests
    command.remove("-x")
    coverage = [sys.executable, "-m", "coverage", "run", "--source=llama_layers"]
    environment = os.environ | {"HYPOTHESIS_PROFILE": "default"}  # few examples show most lines
    status = subprocess.run(
        [*coverage, *command[1:], "-p", "tests.mutation.run"],
        cwd=COPY,
        env=environment,
        check=False,
    ).returncode
    if status:
        raise SystemExit(f"the tests must pass before anything is changed; pytest gave {status}")
    data = CoverageData(str(COPY / ".coverage"))
    data.read()
    of_lines, breadth = {}, Counter[str]()
    for file in data.measured_files():
        of_lines[Path(file).relative_to(COPY)] = lines = data.contexts_by_lineno(file)
        breadth.update({test for tests in lines.values() for test in tests})
    return Tests(of_lines, breadth)


def sample(path: Path, count: int, seed: int) -> list[MutationSpec]:
    """A random choice of mutants of a file or package, the same for the same seed and source."""
    skipped = CONFIG["filters"]["operators-filter"]["exclude-operators"]
    skipped = re.compile("|".join(f"(?:{operator})" for operator in skipped))
    with use_db(":memory:", WorkDB.Mode.create) as database:
        init([path] if path.is_file() else sorted(path.rglob("*.py")), database, {})
        mutations = [item.mutations[0] for item in database.work_items]
    spans = {path: annotated(path) for path in {one.module_path for one in mutations}}
    mutations = [
        one
        for one in mutations
        if not skipped.match(one.operator_name)
        and not any(start <= one.start_pos < end for start, end in spans[one.module_path])
    ]
    mutations.sort(key=lambda one: (str(one.module_path), one.start_pos, one.operator_name))
    return random.Random(seed).sample(mutations, min(count, len(mutations)))


def run(mutation: MutationSpec, tests: Tests) -> WorkResult | None:
    """What the tests say of a mutant; None if no test executes it."""
    nodes = tests.of(mutation)
    if not nodes:
        return None
    options = [part for part in shlex.split(CONFIG["test-command"]) if part != "tests"]
    options[0] = sys.executable
    return mutate_and_test([mutation], shlex.join([*options, *nodes]), CONFIG["timeout"])


def changed_lines(diff: str) -> str:
    """The lines that a diff takes out and puts in, on one line."""
    old, new = (
        " ".join(line[1:].strip() for line in diff.splitlines() if re.match(mark, line))
        for mark in (r"-(?!--)", r"\+(?!\+\+)")
    )
    return f"`{old}` becomes `{new}`"


HEAD = """\
---
orphan: true
---

# Mutants that survived

[cosmic-ray](https://cosmic-ray.readthedocs.io) changes the source at one place, and the tests that
execute this place should fail. Each line below is a change that none of them noticed, and why that
is right or what is missing. `python tests/mutation/run.py` draws the sample, runs the tests and
writes this page. The last run:

```sh
python tests/mutation/{arguments}
```

| Package | Mutants | Killed | Survived |
| --- | --- | --- | --- |
{counts}

| Where | Survivor | Why |
| --- | --- | --- |
{survivors}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paths", nargs="+", default=CONFIG["module-path"], help="what to change")
    parser.add_argument("--sample", type=int, default=100, help="mutants of each path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=["tests"], help="for a quick try: fewer")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    copied()
    os.chdir(COPY)
    tests = measured(options.tests)
    explained: dict[str, str] = tomllib.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    counts, survivors = [], []
    for path in options.paths:
        results: Counter[str] = Counter()
        for mutation in sample(Path(path), options.sample, options.seed):
            result = run(mutation, tests)
            survived = result is None or not result.is_killed
            results["survived" if survived else "killed"] += 1
            name = f"{mutation.module_path}:{mutation.start_pos[0]} {mutation.operator_name}"
            print("survived" if survived else "killed  ", name, flush=True)
            if survived:
                survivors.append(survivor(mutation, result, explained))
        counts.append(
            f"| {path} | {results.total()} | {results['killed']} | {results['survived']} |"
        )
    arguments = " ".join(["run.py", *sys.argv[1:]])
    PAGE.write_text(
        HEAD.format(arguments=arguments, counts="\n".join(counts), survivors="\n".join(survivors))
    )


def survivor(mutation: MutationSpec, result: Any, explained: dict[str, str]) -> str:
    """A line of the page."""
    where = f"{mutation.module_path}: {mutation.definition_name or 'module'}"
    if result is None:
        change = f"line {mutation.start_pos[0]}, {mutation.operator_name}"
        return f"| {where} | {change} | No test executes it. |"
    change = changed_lines(result.diff or "").replace("|", r"\|")
    return f"| {where} | {change} | {explained.get(f'{where}: {change}', '**Not explained.**')} |"


if __name__ == "__main__":
    main()
