"""Processes with a bug of their own.

Each is a fork of one that has loaded the package and its tests, which takes longer than most tests.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shlex
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
LONGEST = 300  # seconds until a process counts as hanging
LOADED = "tests.planted.loaded"
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload([LOADED])


class Outcome(NamedTuple):
    """How tests ended."""

    passed: int
    skipped: int
    errors: list[tuple[str, bool]]
    """What was raised, and whether an assertion raised it."""


class _Counter:
    """A pytest plugin that counts, and keeps what was raised."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0
        self.errors: list[tuple[str, bool]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed and call.excinfo is not None:
            error = call.excinfo.value
            asserted = isinstance(error, AssertionError | pytest.fail.Exception)
            self.errors.append((f"{item.name}: {type(error).__name__}: {error}", asserted))
            if asserted:
                item.session.shouldfail = "one failure is enough"
        elif report.when == "call" and report.passed:
            self.passed += 1
        elif report.skipped:
            self.skipped += 1
        return report


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, _CONTEXT, importlib.import_module, (LOADED,)) as pool:
        return pool.submit(function, *arguments).result(LONGEST)


def outcome_of(*nodes: str) -> Outcome:
    """Run tests in this process, and count."""
    counter = _Counter()
    options = (
        f"-q -m 'not gpu' -p no:cacheprovider --assert=plain --tb=no -c {TESTS.parent}/setup.cfg"
    )
    options += f" --rootdir {TESTS.parent}"
    paths = [str(TESTS / node) for node in nodes]
    with contextlib.redirect_stdout(printed := io.StringIO()):
        status = pytest.main([*shlex.split(options), *paths], [counter])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise LookupError(f"pytest ended with {status!r} for {nodes}: {printed.getvalue()}")
    return Outcome(counter.passed, counter.skipped, counter.errors)
