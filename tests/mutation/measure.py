"""Which tests execute which lines, and how long each takes: a pytest plugin, and its results."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

import pytest
from coverage import Coverage, CoverageData
from hypothesis import Phase, settings

OPTIONS = "-q -p no:cacheprovider --assert=plain --tb=no -p measure"
SECONDS = Path("seconds.json")
_seconds: dict[str, float] = {}

# A mutant has to be found, not made small; few examples show most lines.
for name, examples in (("mutation", 20), ("measure", 5)):
    settings.register_profile(
        name,
        deadline=None,
        max_examples=examples,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate),
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let coverage note which test executes a line, and note the time."""
    measurement = Coverage.current()
    if measurement is None:
        return (yield)
    measurement.switch_context(item.nodeid)
    start = time.perf_counter()
    result = yield
    _seconds[item.nodeid] = time.perf_counter() - start
    return result


def pytest_sessionfinish() -> None:
    """Keep the times."""
    if _seconds:
        SECONDS.write_text(json.dumps(_seconds))


class Tests(NamedTuple):
    """The tests that execute each line of a file, and how long each test takes."""

    of_lines: dict[str, dict[int, list[str]]]
    order: dict[str, tuple[bool, int, float]]
    """Sorts tests: a function's first cases, then what executes few files, then what is fast."""
    seconds: dict[str, float]
    new: set[str]
    """What was not there in the last run: written for what survived it, perhaps."""

    def of(
        self, file: str, lines: range, function: range, words: Set[str], budget: float
    ) -> list[str]:
        """The tests that execute some of the lines, until the time is used.

        First new ones, and those named after a string of the function. Then in turn the nearest
        and the one that executes most lines of the function, since a branch is seen by what goes
        beyond it. Then those of the rest of the file: what runs when it is imported, or is cached,
        matters to all.
        """
        of_file = self.of_lines.get(file, {})
        found = {test for line in lines for test in of_file.get(line, ())}
        if not found:
            return []
        depth = Counter(test for line in function for test in of_file.get(line, ()))
        nearest = self._nearest(found)
        deepest = sorted(nearest, key=lambda test: -depth[test])
        named = [test for test in nearest if any(word in test for word in words)]
        in_turn = itertools.chain.from_iterable(zip(nearest, deepest, strict=True))
        rest = self._nearest(self._of_files([file, *self._importers(file)]))
        new = [test for test in [*nearest, *rest] if test in self.new]
        chosen: dict[str, None] = {}
        used = 0.0
        for test in [*new, *named, *in_turn, *rest]:
            if test not in chosen and (not chosen or used + self.seconds[test] <= budget):
                chosen[test] = None
                used += self.seconds[test]
        return list(chosen)

    def _nearest(self, tests: Set[str]) -> list[str]:
        return sorted(tests & self.seconds.keys(), key=lambda test: (self.order[test], test))

    def _of_files(self, files: list[str]) -> set[str]:
        """The tests in the files, and those that execute some of them."""
        executing = {
            t for file in files for tests in self.of_lines.get(file, {}).values() for t in tests
        }
        return executing | {t for t in self.seconds if t.partition("::")[0] in files}

    def _importers(self, file: str) -> list[str]:
        """The files of the package, and of its tests, that import something from a file."""
        module = file.removesuffix(".py").replace("/", ".")
        files = {*self.of_lines, *(test.partition("::")[0] for test in self.seconds)}
        return [f for f in sorted(files) if f"from {module} import" in Path(f).read_text()]


def measured(tests: str, before: Path) -> Tests:
    """Run the tests once in this directory, and see which lines each of them executes."""
    command = f"-m coverage run --source=llama_layers -m pytest {OPTIONS} {tests}"
    environment = os.environ | {"HYPOTHESIS_PROFILE": "measure"}
    status = subprocess.run([sys.executable, *shlex.split(command)], env=environment).returncode
    if status:
        raise SystemExit(f"the tests must pass before anything is changed; pytest gave {status}")
    return read(before)


def read(before: Path) -> Tests:
    """The results of the run in this directory, and which tests a file of names does not have."""
    seconds: dict[str, float] = json.loads(SECONDS.read_text())
    data = CoverageData()
    data.read()
    of_lines = {
        str(Path(path).relative_to(Path.cwd())): data.contexts_by_lineno(path)
        for path in data.measured_files()
    }
    breadth = Counter(
        test
        for lines in of_lines.values()
        for test in {test for tests in lines.values() for test in tests}
    )
    cases: dict[str, list[str]] = defaultdict(list)
    for test in sorted(seconds, key=seconds.__getitem__):
        cases[test.partition("[")[0]].append(test)
    order = {
        test: (place >= 3, breadth[test], seconds[test])
        for of_one in cases.values()
        for place, test in enumerate(of_one)
    }
    known = json.loads(before.read_text()) if before.exists() else list(seconds)
    return Tests(of_lines, order, seconds, seconds.keys() - known)
