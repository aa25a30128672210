"""Run something against a copy of the package, in a process of its own.

The processes are forks of one that has loaded the libraries which tests use, but no part of the
package: loading them takes longer than most tests.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes below: many run at once
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    """
    array_api_compat.numpy array_api_strict hypothesis.extra.numpy ml_dtypes numpy pytest
    safetensors.numpy
    """.split()
)


class Outcome(NamedTuple):
    """How tests ended."""

    status: int
    passed: int
    skipped: int
    failures: list[tuple[str, bool]]
    """What was raised, and whether an assertion raised it."""
    files: list[str]
    """Those of the package that were loaded."""


class Counter:
    """Counts what passed and what was skipped, and keeps what was raised."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0
        self.failures: list[tuple[str, bool]] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed:
            error = call.excinfo.value
            asserted = isinstance(error, AssertionError | pytest.fail.Exception)
            self.failures.append((f"{type(error).__name__}: {error}", asserted))
        elif report.when == "call" and report.passed:
            self.passed += 1
        elif report.skipped:
            self.skipped += 1
        return report


def with_copy(directory, function, *arguments):
    """What a function returns in a new process that imports the package from a directory."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(_there, str(directory), function, arguments).result()


def _there(directory, function, arguments):
    assert "llama_layers" not in sys.modules, "the package was loaded before its copy"
    os.chdir(directory)
    sys.path.insert(0, directory)
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    os.environ["LLAMA_LAYERS_FAST"] = "0"  # each copy's kernels would be compiled anew
    return function(*arguments)


def outcome(*nodes):
    """How tests end."""
    counter = Counter()
    options = ["-c", f"{ROOT}/setup.cfg", "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is loaded already
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main([*options, *(f"{ROOT}/tests/{node}" for node in nodes)], [counter])
    loaded = [getattr(m, "__file__", None) for n, m in sys.modules.items() if "llama_layers" in n]
    return Outcome(
        int(status), counter.passed, counter.skipped, counter.failures, [f for f in loaded if f]
    )
