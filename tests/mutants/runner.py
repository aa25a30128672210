"""Run tests against a copy of the package, and say how they ended.

``python runner.py DIRECTORY ROOT NODE_ID...`` puts the directory that holds the copy first on the
path, and prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys

import pytest


class Outcomes:
    """Counts what passed, and keeps what was raised in the calls of tests."""

    def __init__(self) -> None:
        self.passed = 0
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
        return report


def main(directory: str, root: str, *nodes: str) -> None:
    sys.path.insert(0, directory)
    outcomes = Outcomes()
    options = ["-c", f"{root}/setup.cfg", "--rootdir", root, "-q", "-p", "no:cacheprovider"]
    status = pytest.main([*options, *(f"{root}/tests/{node}" for node in nodes)], [outcomes])
    files = [getattr(m, "__file__", None) for n, m in sys.modules.items() if "llama_layers" in n]
    result = {"status": status, "passed": outcomes.passed, "failures": outcomes.failures}
    print(f"\n{json.dumps(result | {'files': files})}")


if __name__ == "__main__":
    main(*sys.argv[1:])
