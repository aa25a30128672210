"""`check` finds every planted bug that changes an activation, at the first site, and names it.

The bug is planted in a process of its own, which runs models as a port would. Here, where nothing
is wrong, their arrays are checked. The right site is the first whose array differs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llama_layers.verify import Report, check, sites
from tests.planted import port
from tests.planted.bugs import BUGS
from tests.planted.planting import NOT_NAMED, Wrong, plant
from tests.planted.processes import in_a_process

IN_A_PORT = [bug for bug in BUGS if bug.cause is not None]
MOST = 3  # cases of a bug that are checked
CHANGED = 1e-4  # relative: less may be within rounding
GENERAL = ("RoPE with other frequencies", "everything scaled")
"""Causes that say where to look, and not what the mistake is."""


def run_with_bug(index: int) -> dict[port.Case, port.Arrays]:
    """Plant a bug, which cannot be sent to a process, and run the port."""
    plant(BUGS[index])
    return port.run()


@pytest.fixture(scope="session")
def right() -> Any:
    """The port without a bug."""
    return in_a_process(port.run)


def first_change(wrong: port.Arrays, right: port.Arrays, case: port.Case) -> str | None:
    """The first site at which two runs differ where tokens are not padding, if any does by much."""
    first, largest = None, 0.0
    valid = port.valid_tokens(case[1])
    for site in sites(port.CONFIGS[case[0]]):
        if site.optional or site.name not in wrong:
            continue
        a, b = wrong[site.name], right[site.name]
        if a.shape != b.shape:
            return None  # refused before anything is compared
        a, b = (array[valid].astype(float) for array in (a, b))
        if not np.array_equal(a, b, equal_nan=True):
            first = first or site.name
            difference = np.linalg.norm(a - b) / np.linalg.norm(b)
            largest = max(largest, np.nan_to_num(difference, nan=np.inf))
    return first if largest > CHANGED else None


def changes(wrong: Any, right: Any) -> dict[port.Case, str]:
    """The first site that differs, in each case in which one does."""
    found = {case: first_change(wrong[case], right[case], case) for case in wrong}
    return {case: site for case, site in found.items() if site is not None}


def report_on(arrays: port.Arrays, case: port.Case, explain: bool = False) -> Report:
    return check(port.trace_of(arrays, case[1]), port.model(case[0]), explain=explain)


@pytest.mark.parametrize("case", list(port.cases()), ids=" ".join)
def test_no_false_alarm(right: Any, case: port.Case) -> None:
    report = report_on(right[case], case)
    assert report.agrees, report.first


@pytest.mark.parametrize("bug", IN_A_PORT, ids=lambda bug: bug.name)
def test_found_and_named(right: Any, bug: Wrong) -> None:
    wrong = in_a_process(run_with_bug, BUGS.index(bug))
    changed = changes(wrong, right)
    assert changed, "no activation changes"
    first, *others = list(changed)[:: -(-len(changed) // MOST)]
    report = report_on(wrong[first], first, explain=True)
    assert report.first is not None, first
    assert report.first.site.name == changed[first], first
    if bug.cause != NOT_NAMED:
        assert report.first.explanations, report
        assert report.first.explanations[0].name == bug.cause, report
    for case in others:
        report = report_on(wrong[case], case)
        assert report.first is not None, case
        assert report.first.site.name == changed[case], case


def test_most_are_named() -> None:
    unnamed = sum(bug.cause in (*GENERAL, NOT_NAMED) for bug in IN_A_PORT)
    assert unnamed <= 0.2 * len(IN_A_PORT)
