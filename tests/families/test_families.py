"""Each known mistake is found and named in families other than Llama, and nothing without one."""

from __future__ import annotations

from collections import Counter

import pytest

from llama_layers.config.families import FAMILIES, SWITCHES
from tests.families.configs import CONFIGS
from tests.families.run import MISTAKES, found, ran, report_of

_OTHERS = [family for family in CONFIGS if family != "llama"]
# Each mistake is tried in one family: some in each run of the tests, all in a slow one.
_NUMBERS = range(len(MISTAKES))
_QUICK = _NUMBERS[::15]
# What the families' tiny configs are too small or too plain for.
_NOWHERE = {"another parameter of RoPE scaling"}


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


def elsewhere(number):
    """What is said of a mistake in the first family, from its own turn on, where it can be made."""
    turn = number % len(_OTHERS)
    every = (found(family, number) for family in (_OTHERS * 2)[turn : turn + len(_OTHERS)])
    return next((one for one in every if one is not None), None)


@pytest.mark.slow
def test_each_mistake_can_be_made_outside_llama():
    """But those that need padding, far positions, or weights of a test's own."""
    alone = {"mha", "small", "large", "huge", "linear", "dynamic", "six heads", "two RoPEs"}
    rest = [m for m in MISTAKES if m.config not in alone and not m.padded and not m.first]
    assert {m.name for m in rest if not any(_made(f, m) for f in _OTHERS)} <= _NOWHERE


def _made(family, mistake):
    try:
        return ran(family, mistake)[1]
    except KeyError:
        return False


@pytest.mark.parametrize("number", _QUICK)
def test_some_are_found_and_named(number):
    if (one := elsewhere(number)) is not None:
        assert one.located, one
        assert one.grade == "right", one


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("glm", "weight transposed"),  # in the order of rows that its files have
        ("glm4", "keys for values"),
        ("gemma2", "another page of the cache"),  # whose scores are capped
        ("granite_swa", "empty keys counted"),  # whose softmax has a sink
        ("gemma", "relu for silu"),
        ("hunyuan_v1_dense", "another layer's keys and values"),  # which are normalised after RoPE
        ("qwen3", "another norm's weight"),
        ("ministral3", "RoPE with other frequencies"),  # whose queries have a temperature
    ],
)
def test_named_with_the_switches_of_a_family(family, name):
    numbers = [number for number in _NUMBERS if MISTAKES[number].name == name]
    one = next(one for number in reversed(numbers) if (one := found(family, number)))
    assert one.located, one
    assert one.grade == "right", one


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_are_found_and_named(part):
    every = [one for number in _NUMBERS[part::8] if (one := elsewhere(number)) is not None]
    grades = Counter(one.grade for one in every)
    assert [one for one in every if not one.located] == []
    assert grades["right"] >= 0.9 * len(every), [one for one in every if one.grade != "right"]
    assert grades["wrong"] <= max(1, 0.01 * len(every))
