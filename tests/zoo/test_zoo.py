"""The thresholds that diagnosis is held to, on mistakes that it was not made for."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.zoo.names import PATTERNS, judged
from tests.zoo.registry import MISTAKES, TEXTS
from tests.zoo.run import VIEWS, alarms, arrays_of, change, findings
from tests.zoo.variants import VARIANTS

RIGHT = {"float32": 0.85, "bfloat16": 0.70, "layer outputs": 0.70}
WRONG = 0.01
# One of each kind, for every run of the tests.
SAMPLE = (
    "ids_shifted", "positions_restart_each_chunk", "scaling_ignored", "rotated_other_way",
    "eps_default", "mean_subtracted", "output_weight_transposed", "bias_on_each_rank",
    "tail_of_outputs_zero", "key_heads_tiled", "mask_one_late", "last_block_dropped", "relu",
    "residual_stale", "logits_soft_capped",
)  # fmt: skip


def test_names_are_those_of_the_list():
    assert set(MISTAKES) == set(TEXTS) == set(PATTERNS)
    assert len(MISTAKES) >= 150
    assert len(VARIANTS) >= 100


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one(name):
    mistake = MISTAKES[name]
    right, wrong, _ = arrays_of(mistake, "float32")
    before = [site for site in wrong if change(right, wrong, site) > 2e-5]
    assert mistake.first in before
    # Sites are recorded in order, but for a layer's own, which comes last.
    assert min(before, key=list(wrong).index) == mistake.first
    assert (change(right, wrong, "lm_head") < 1e-4) == bool(mistake.unseen)


def test_grades():
    assert judged("relu", ()) == "none"
    assert judged("relu", ("relu for silu",)) == "right"
    assert judged("relu", ("sums kept in bfloat16", "relu for silu")) == "near"
    assert judged("relu", ("sums kept in bfloat16",)) == "wrong"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_found_and_named(name):
    [found] = findings(MISTAKES[name], ("float32",))
    assert found.at_right_site
    assert found.grade == "right", found.names


def test_a_root_in_more_bits_than_the_results_explains_nothing():
    [found] = findings(MISTAKES["one_layer_eps"], ("bfloat16",))
    assert found.grade == "right", found.names


@pytest.mark.parametrize("number", range(0, len(VARIANTS), 12))
def test_a_sample_of_variants_passes(number):
    assert alarms(VARIANTS[number]) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, len(VARIANTS), 3))
def test_no_false_alarm(number):
    assert alarms(VARIANTS[number]) == []


# What is short of its threshold, by what was recorded: nothing may be added to it.
SHORT = {
    ("right name", "float32"),  # of this part; of all 88 % have it
    ("right name", "layer outputs"),
}


@pytest.mark.slow
def test_thresholds():
    """On every twelfth mistake; from layers' outputs or logits, on every seventy-second.

    Those take seconds each: `python -m tests.zoo` tries them all.
    """
    every = [
        one
        for number, mistake in enumerate(MISTAKES.values())
        if number % 12 == 0
        for one in findings(mistake, VIEWS[:3] if number % 72 else VIEWS)
    ]
    short: set[tuple[str, str]] = set()
    for view in VIEWS:
        found = [one for one in every if one.view == view]
        grades = Counter(one.grade for one in found)
        if not all(one.at_right_site for one in found):
            short.add(("first site", view))
        if grades["right"] < RIGHT.get(view, 0) * grades.total():
            short.add(("right name", view))
        if grades["wrong"] > max(1, WRONG * grades.total()):  # of few, one is more than 1 %
            short.add(("wrong name", view))
    assert short <= SHORT
