"""Every planted bug makes the test that is named for it fail: ``pytest -n auto tests/planted``."""

from __future__ import annotations

import pytest

from tests.planted.bugs import BUGS
from tests.planted.planting import Wrong, plant
from tests.planted.processes import Outcome, in_a_process, outcome_of


def with_bug(index: int) -> Outcome:
    """Plant a bug, which cannot be sent to a process, and run its test."""
    plant(BUGS[index])
    return outcome_of(BUGS[index].caught_by)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_caught(bug: Wrong) -> None:
    if ".numba." in bug.path:
        pytest.importorskip("numba", reason="needs the extra fast")
    outcome = in_a_process(with_bug, BUGS.index(bug))
    if outcome.skipped and not outcome.passed and not outcome.errors:
        pytest.skip(f"{bug.caught_by} is skipped here")
    assert outcome.errors, f"{bug.caught_by} passes with the bug in {bug.path}"
    assert any(asserted for _, asserted in outcome.errors), outcome.errors


@pytest.mark.parametrize("file", sorted({bug.caught_by.partition("::")[0] for bug in BUGS}))
def test_passes_without_bugs(file: str) -> None:
    nodes = {bug.caught_by for bug in BUGS if bug.caught_by.partition("::")[0] == file}
    outcome = in_a_process(outcome_of, *sorted(nodes))
    assert not outcome.errors
    assert outcome.passed + outcome.skipped >= len(nodes)


def test_names_tell_bugs_apart() -> None:
    names = [bug.name for bug in BUGS]
    assert sorted(set(names)) == sorted(names)


def test_a_stale_path_is_named() -> None:
    with pytest.raises(LookupError, match="norm:normalize is stale: KeyError"):
        plant(Wrong("llama_layers.layers.norm:normalize", lambda right: right, ""))
