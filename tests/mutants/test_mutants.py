"""Every planted bug is found by the test named for it: ``pytest -n auto tests/mutants``."""

from __future__ import annotations

from pathlib import Path

import pytest
import runner
from write_table import PAGE, SUBJECTS, page

MUTANTS = [mutant for mutants in SUBJECTS.values() for mutant in mutants]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_killed(package, mutant):
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"stale: found {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    outcome = runner.with_copy(package.parent, runner.outcome, mutant.killed_by)
    # What a GPU runs is no module.
    assert path.suffix != ".py" or str(path) in outcome.files, "never loaded"
    assert_of_the_copy(outcome, package)
    if outcome.status == pytest.ExitCode.OK and not outcome.passed:
        pytest.skip(f"{mutant.killed_by} is skipped here")
    assert outcome.status == pytest.ExitCode.TESTS_FAILED, "survived"
    assert any(asserted for _, asserted in outcome.failures), outcome.failures


def test_nothing_fails_without_the_bugs(package):
    nodes = sorted({mutant.killed_by for mutant in MUTANTS})
    outcome = runner.with_copy(package.parent, runner.outcome, *nodes)
    assert_of_the_copy(outcome, package)
    assert outcome.status == pytest.ExitCode.OK, outcome.failures
    assert outcome.passed + outcome.skipped >= len(nodes)


def assert_of_the_copy(outcome, package):
    for file in outcome.files:
        assert Path(file).is_relative_to(package), f"{file} is none of the copy's"


def test_names_tell_mutants_apart():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_the_page_lists_them():
    assert PAGE.read_text(encoding="utf-8") == page(), "run tests/mutants/write_table.py"
