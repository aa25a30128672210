"""Every planted bug is found by the test named for it: ``pytest -n auto tests/mutants``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bound_bugs
import catalogue
import decoder
import decoding
import pytest
import verify_diagnose_bugs
import verify_recorders_bugs
import verify_report_bugs

ROOT = Path(__file__).parents[2]
SUBJECTS = (
    catalogue,
    decoder,
    decoding,
    bound_bugs,
    verify_diagnose_bugs,
    verify_recorders_bugs,
    verify_report_bugs,
)
MUTANTS = [mutant for subject in SUBJECTS for mutant in subject.MUTANTS]


def run(directory, *nodes):
    """How tests end with the package that is in a directory."""
    runner = Path(__file__).with_name("runner.py")
    finished = subprocess.run(
        [sys.executable, runner, directory, ROOT, *nodes],
        cwd=directory,
        env=os.environ | {"HYPOTHESIS_PROFILE": "mutants", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    outcome = json.loads(finished.stdout.splitlines()[-1])
    for file in outcome["files"]:
        assert Path(file).is_relative_to(directory), f"{file} is none of the copy's"
    return outcome


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_killed(package, mutant):
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"stale: found {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    outcome = run(package.parent, mutant.killed_by)
    assert str(path) in outcome["files"], "never loaded"
    assert outcome["status"] == pytest.ExitCode.TESTS_FAILED, "survived"
    assert any(asserted for _, asserted in outcome["failures"]), outcome["failures"]


def test_nothing_fails_without_the_bugs(package):
    nodes = sorted({mutant.killed_by for mutant in MUTANTS})
    outcome = run(package.parent, *nodes)
    assert outcome["status"] == pytest.ExitCode.OK, outcome["failures"]
    assert outcome["passed"] >= len(nodes)


def test_names_tell_mutants_apart():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)
