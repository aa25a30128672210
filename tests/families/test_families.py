"""Each known mistake is found and named in families other than Llama, and nothing without one."""

from __future__ import annotations

from collections import Counter

import pytest

from llama_layers.config.families import FAMILIES, SWITCHES
from tests.families.configs import CONFIGS
from tests.families.run import found, ran, report_of, share
from tests.support.mistakes import MISTAKES

# Of all families, one of so many mistakes is tried in each run of the tests, and in a slow one.
_QUICK, _SLOW = 89, 23


def test_each_family_has_a_config():
    assert CONFIGS.keys() == FAMILIES.keys()


def test_each_switch_is_on_somewhere():
    on = {name for config in CONFIGS.values() for name in config.switches}
    assert on == SWITCHES.keys() - {"qk_norm_weight"}  # which no family has off


@pytest.mark.parametrize("family", CONFIGS)
def test_no_false_alarm(family):
    report = report_of(family)
    assert report.agrees
    assert not any(result.explanations for result in report.results)


def test_each_mistake_can_be_made_outside_llama():
    """But those that need padding, far positions, or weights of a test's own."""
    alone = {"mha", "small", "large", "huge", "linear", "dynamic"}
    rest = [m for m in MISTAKES if m.config not in alone and not m.padded and not m.first]
    others = [family for family in CONFIGS if family != "llama"]
    for mistake in rest:
        assert any(_made(family, mistake) for family in others), mistake


def _made(family, mistake):
    try:
        return ran(family, mistake)[1]
    except KeyError:
        return False


def graded(part, of):
    every = [one for pair in share(part, of) if (one := found(*pair)) is not None]
    assert [one for one in every if not one.located] == []
    return every


def test_a_part_is_found_and_named():
    every = graded(0, _QUICK)
    assert len(every) > 50
    grades = Counter(one.grade for one in every)
    assert grades["right"] >= 0.9 * len(every), [one for one in every if one.grade != "right"]
    assert grades["wrong"] <= max(1, 0.01 * len(every))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 4))
def test_more_are_found_and_named(part):
    every = graded(part, _SLOW)
    grades = Counter(one.grade for one in every)
    assert grades["right"] >= 0.9 * len(every), [one for one in every if one.grade != "right"]
    assert grades["wrong"] <= max(1, 0.01 * len(every))
