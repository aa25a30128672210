"""Every planted bug is found by the test named for it: ``pytest -n auto tests/mutants``."""

from __future__ import annotations

import pytest
import runner
from write_table import MUTANTS, PAGE, page


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_killed(package, mutant):
    runner.plant(mutant, package)
    runner.assert_found(mutant, package, mutant.killed_by)


def test_nothing_fails_without_the_bugs(package):
    runner.assert_all_pass(package, *sorted({mutant.killed_by for mutant in MUTANTS}))


def test_names_tell_mutants_apart():
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_the_page_lists_them():
    assert PAGE.read_text(encoding="utf-8") == page(), "run tests/mutants/write_table.py"
