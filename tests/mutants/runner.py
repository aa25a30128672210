"""Run something against a copy of the package, in a process of its own.

The processes are forks of one that has loaded the libraries which tests use, but no part of the
package: loading them takes longer than most tests.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
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
    """What was raised, and whether an assertion raised it, or a GPU."""
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
            name = type(error).__name__
            asserted = isinstance(error, AssertionError | pytest.fail.Exception)
            # A GPU says by such an error that a kernel read or wrote where nothing is.
            asserted = asserted or name.startswith("CUDA")
            self.failures.append((f"{name}: {error}", asserted))
            if asserted:
                item.session.shouldfail = "that is enough"
        elif report.when == "call" and report.passed:
            self.passed += 1
        elif report.skipped:
            self.skipped += 1
        return report


def plant(mutant, package):
    """Put a bug into a copy of the package."""
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"stale: found {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def assert_found(mutant, package, *nodes, marked="not gpu"):
    """The tests find the bug that was planted."""
    outcome = of_copy(package, marked, *nodes)
    if outcome.status == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip(f"{nodes[0]} is not for what is marked: {marked}")
    # What a GPU runs is no module.
    file = package / mutant.file
    assert file.suffix != ".py" or str(file) in outcome.files, "never loaded"
    if outcome.status == pytest.ExitCode.OK and not outcome.passed:
        pytest.skip(f"{nodes[0]} is skipped here")
    assert outcome.status == pytest.ExitCode.TESTS_FAILED, "survived"
    assert any(asserted for _, asserted in outcome.failures), outcome.failures


def assert_all_pass(package, *nodes, marked="not gpu"):
    """Without a bug."""
    outcome = of_copy(package, marked, *nodes)
    assert outcome.status == pytest.ExitCode.OK, outcome.failures
    assert outcome.passed + outcome.skipped >= len(nodes)


def of_copy(package, marked, *nodes):
    """How tests of a copy of the package end."""
    outcome = with_copy(package.parent, _outcome, marked, *nodes)
    for file in outcome.files:
        assert Path(file).is_relative_to(package), f"{file} is none of the copy's"
    return outcome


def with_copy(directory, function, *arguments):
    """What a function returns in a new process that imports the package from a directory."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        return pool.submit(_there, str(directory), function, arguments).result()


def _there(directory, function, arguments):
    assert "llama_layers" not in sys.modules, "the package was loaded before its copy"
    os.chdir(directory)
    sys.path.insert(0, directory)
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    # No plugins, nor better messages: reading all that takes as long as most of the tests.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["LLAMA_LAYERS_VERIFY"] = "0"  # a body with a bug serves all the same
    os.environ["LLAMA_LAYERS_FAST"] = "0"  # each copy's kernels would be compiled anew
    return function(*arguments)


def _outcome(marked, *nodes):
    """How tests end that are marked so."""
    counter = Counter()
    options = f"-q -m '{marked}' -p no:cacheprovider --assert=plain"
    options += f" -c {ROOT}/setup.cfg --rootdir {ROOT}"
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(
            [*shlex.split(options), *(f"{ROOT}/tests/{node}" for node in nodes)], [counter]
        )
    loaded = [getattr(m, "__file__", None) for n, m in sys.modules.items() if "llama_layers" in n]
    return Outcome(
        int(status), counter.passed, counter.skipped, counter.failures, [f for f in loaded if f]
    )
