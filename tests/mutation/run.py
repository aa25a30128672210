"""Change the source at random places, and list the changes that no test notices.

``python tests/mutation/run.py`` needs ``pip install cosmic-ray==8.7.0 coverage`` and hours. It
works on a copy of the project, draws mutants of each file, and runs for each only the tests that
execute the changed line, in a fork of a process that has loaded the libraries. It adds each result
to build/mutants.jsonl, and writes docs/evidence/mutation.md from them. Explain each survivor in
explained.toml, or write the test that kills it. The next run tries survivors again; without the
file of results it tries all.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import measure
import page
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "mutation"
RESULTS = ROOT / "build" / "mutants.jsonl"
KNOWN = ROOT / "build" / "tests.json"

CONFIG = tomllib.loads((Path(__file__).parent / "cosmic-ray.toml").read_text())
SKIPPED = "|".join(CONFIG["cosmic-ray"]["filters"]["operators-filter"]["exclude-operators"])
OPERATORS = [
    operator
    for operator in operator_names()
    if not re.match(SKIPPED, operator) and not get_operator(operator).arguments()
]
FIRST = 12  # tests are tried before all others are loaded
LIBRARIES = (  # which tests import
    "array_api_compat.numpy",
    "array_api_strict",
    "hypothesis.extra.numpy",
    "jinja2.sandbox",
    "numpy.testing",
    "tokenizers",
    "_pytest.doctest",
)
ENVIRONMENT = {
    "HYPOTHESIS_PROFILE": "mutation",
    "LLAMA_LAYERS_FAST": "0",  # compiled bodies are not what is changed
    "OPENBLAS_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTHONPATH": f"{COPY}:{COPY / 'tests' / 'mutation'}",
}


def copied() -> None:
    """Make the copy anew, with all that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    shutil.rmtree(COPY, ignore_errors=True)
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file begin and end: nothing evaluates them."""
    return [
        ((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset))
        for node in ast.walk(ast.parse(source))
        for field in ("annotation", "returns")
        if (part := getattr(node, field, None)) is not None
    ]


class Place(NamedTuple):
    """Where a mutant is."""

    statement: range
    """The lines of the statement, or of the head of the block."""
    function: range
    """The lines of the function, or else of the file."""
    words: frozenset[str]
    """The strings of the outermost function, which tests of one of its cases may be named after."""

    @classmethod
    def of(cls, source: str, line: int) -> Place:
        """Where a line is."""
        statement, function, inside = range(0), range(1, source.count("\n") + 1), None
        for node in ast.walk(ast.parse(source)):  # a block before its parts
            if isinstance(node, ast.stmt):
                decorators = getattr(node, "decorator_list", ())
                first = min([node.lineno, *(one.lineno for one in decorators)])
                last = node.end_lineno or first
                if first <= line <= last:
                    body = getattr(node, "body", None)
                    in_head = body and line < body[0].lineno
                    statement = range(first, body[0].lineno if in_head else last + 1)
                    if isinstance(node, ast.FunctionDef) and not in_head:
                        function, inside = range(first, last + 1), inside or node
        strings = (
            node.value
            for node in (ast.walk(inside) if inside else ())
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        )
        return cls(statement, function, frozenset(word for word in strings if len(word) > 4))


class Mutant(NamedTuple):
    """A change of one file."""

    file: str
    function: str
    line: int
    operator: str
    occurrence: int

    @property
    def source(self) -> str:
        """The file without the change."""
        return Path(self.file).read_text()

    def changed(self) -> str:
        """The file with the change."""
        changed: str | None = mutate_code(
            self.source, get_operator(self.operator)(), self.occurrence
        )
        assert changed is not None, f"{self} changes nothing"
        return changed


def count(file: Path) -> int:
    """How many mutants of a file are drawn."""
    counts: dict[str, int] = CONFIG["mutants"]
    return counts[max((path for path in counts if file.is_relative_to(path)), key=len)]


def mutants_of(file: Path, seed: int) -> list[Mutant]:
    """Random mutants of a file, the same for the same seed and source."""
    source = file.read_text()
    nodes, spans = list(ast_nodes(get_ast(source))), annotated(source)
    mutants = []
    for operator in OPERATORS:
        positions = [
            (node, position)
            for node in nodes
            for position, _ in get_operator(operator)().mutation_positions(node)
        ]
        for occurrence, (node, position) in enumerate(positions):
            if not any(start <= position < end for start, end in spans):
                function = ASTQuery(node).get_definition_name() or ""
                mutants.append(Mutant(str(file), function, position[0], operator, occurrence))
    mutants.sort()
    random.Random(f"{seed} {file}").shuffle(mutants)
    return mutants[: count(file)]


def drawn(paths: list[str], seed: int) -> list[Mutant]:
    """Mutants of all files: the first of each, then the second of each."""
    found = [Path(path) for path in paths]
    files = [file for path in found for file in sorted(path.rglob("*.py")) or [path]]
    turns = zip_longest(*(mutants_of(file, seed) for file in files))
    return [mutant for turn in turns for mutant in turn if mutant is not None]


class Chosen:
    """A pytest plugin that runs the given tests in the given order, and says which one fails."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: place for place, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(chosen, key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            Path("failed.txt").write_text(report.nodeid)


def outcome(tests: list[str], seconds: float) -> str:
    """Run tests in a fork of this process: killed, survived or timeout."""
    Path("failed.txt").unlink(missing_ok=True)
    if not (process := os.fork()):
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        files = sorted({test.partition("::")[0] for test in tests})
        os._exit(pytest.main([*shlex.split(measure.OPTIONS), "-x", *files], [Chosen(tests)]))
    end = time.monotonic() + seconds
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "timeout"
        time.sleep(0.01)
    passed = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return "survived" if os.waitstatus_to_exitcode(ended[1]) in passed else "killed"


def tried(mutant: Mutant, tests: measure.Tests, budget: float) -> dict[str, Any]:
    """The outcome of a mutant, within a number of seconds of tests."""
    start = time.monotonic()
    source, file = mutant.source, Path(mutant.file)
    changed, times = mutant.changed(), file.stat()
    nodes = tests.of(mutant.file, *Place.of(source, mutant.line), budget)
    result = "survived" if nodes else "not executed"
    file.write_text(changed)
    try:
        for part in (nodes[:FIRST], nodes[FIRST:]):
            if part and result == "survived":
                usual = sum(tests.seconds[test] for test in part)
                result = outcome(part, 30 + 8 * usual)
    finally:
        file.write_text(source)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # its bytecode serves again
    failed = Path("failed.txt")
    return {
        **mutant._asdict(),
        "change": page.change(source, changed),
        "outcome": result,
        "failed": failed.read_text() if result == "killed" and failed.exists() else "",
        "tests": len(nodes),
        "seconds": round(time.monotonic() - start, 2),
    }


def passes_unchanged(results: list[dict[str, Any]]) -> None:
    """Check that the tests that failed for mutants pass without any."""
    failed = sorted({result["failed"] for result in results} - {""})
    for start in range(0, len(failed), 100):
        if outcome(failed[start : start + 100], 1800) != "survived":
            raise SystemExit(f"{Path('failed.txt').read_text()} fails without a mutant, too")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    paths = CONFIG["cosmic-ray"]["module-path"]
    parser.add_argument("--paths", nargs="+", default=paths, help="what to change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--most", type=int, help="stop after this number of mutants, a part of each file's"
    )
    parser.add_argument("--tests", default=CONFIG["cosmic-ray"]["tests"], help="pytest's arguments")
    parser.add_argument("--measured", action="store_true", help="the copy and its measure stand")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    if not options.measured:
        copied()
    os.chdir(COPY)
    sys.path[:] = [str(COPY), *(entry for entry in sys.path if entry != str(ROOT))]
    tests = measure.read(KNOWN) if options.measured else measure.measured(options.tests, KNOWN)
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    mutants = drawn(options.paths, options.seed)[: options.most]
    earlier, reasons = page.results(RESULTS), page.explained()
    at_first, again = CONFIG["cosmic-ray"]["budget"]
    for place, mutant in enumerate(mutants, 1):
        known = earlier.get(mutant)
        if known is None or (
            known["outcome"] in page.SURVIVING and page.name(known) not in reasons
        ):
            known = tried(mutant, tests, at_first if known is None else again)
            with RESULTS.open("a") as stream:
                print(json.dumps(known), file=stream)
            shown = (known[name] for name in ("outcome", "seconds", "file", "change"))
            print(f"{place}/{len(mutants)}", *shown, flush=True)
    found = page.results(RESULTS)
    results = [found[mutant] for mutant in mutants]
    KNOWN.write_text(json.dumps(sorted(tests.seconds)))
    page.write(results)
    passes_unchanged(results)


if __name__ == "__main__":
    main()
