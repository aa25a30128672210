"""Reports of checks: what they come to, and how they are told as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest

from llama_layers.verify import (
    Element,
    Explanation,
    Judgement,
    Report,
    SiteResult,
    check,
    record,
    to_html,
)
from llama_layers.verify.report import EDGES
from llama_layers.verify.report.template import bin_of
from llama_layers.verify.report.wording import apart
from tests.support.made_reports import (
    INTERLEAVED,
    K_ROPE,
    Q_ROPE,
    SITES,
    interleaved,
    report,
    result,
    unjudged,
)
from tests.support.random_models import GQA, model_of, random_weights

NORM = "model.layers.0.input_layernorm"
NOT_A_NUMBER = float("nan")


@pytest.mark.parametrize(
    ("results", "verdict", "status"),
    [
        ([result(NORM)], "PASS", 0),
        ([result(NORM), unjudged("lm_head")], "PASS", 0),
        ([result(NORM), result("lm_head", "WARN")], "WARN", 0),
        ([result(NORM, "WARN"), result("lm_head", "FAIL")], "FAIL", 1),
        ([result(NORM), unjudged("lm_head", "DIFFERS")], "FAIL", 1),
        ([unjudged("model.norm", difference=NOT_A_NUMBER), unjudged("lm_head")], "SEEN", 0),
        ([unjudged("lm_head", difference=NOT_A_NUMBER)], "NONE", 2),
        ([], "NONE", 2),
    ],
)
def test_what_results_come_to(results, verdict, status):
    made = Report(tuple(results))
    assert (made.verdict, made.exit_status) == (verdict, status)
    assert made.agrees is (status == 0)
    assert str(made).startswith(f"{verdict}: ")


def test_the_first_failure_is_the_first_of_the_forward_pass():
    differs, fails = unjudged(NORM, "DIFFERS", 0.5), result("lm_head", "FAIL", 1e9)
    assert report(differs, fails).first is differs
    assert report(fails, result(NORM, "WARN")).first is fails
    assert report(differs, fails).failures == (differs, fails)
    assert report().first is None


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (
            report(result(Q_ROPE[1], "FAIL", 12345.0), result(Q_ROPE[2], "FAIL", 1e6)),
            "FAIL: first at model.layers.1.self_attn.q_rope: error 1.2e+04 times what rounding "
            "allows, at [0, 5, 3]: port 0.5, exact 0.25",
        ),
        (
            report(
                result(NORM, "FAIL", math.inf, worst=(Element((0, 5, 3), math.nan, 0.25, 1e-6),))
            ),
            "FAIL: first at model.layers.0.input_layernorm: an error that no rounding allows, at "
            "[0, 5, 3]: port nan, exact 0.25",
        ),
        (
            report(
                result(NORM, "FAIL", 1.0004, worst=(Element((0, 5, 3), 0.1 + 2e-9, 0.1, 1e-9),))
            ),
            "FAIL: first at model.layers.0.input_layernorm: error 1.0004 times what rounding "
            "allows, at [0, 5, 3]: port 0.100000002, exact 0.1",
        ),
        (
            report(unjudged("lm_head", "DIFFERS", 0.0123, 2.9e-6)),
            "FAIL: first at lm_head: differs by 0.012 from a recomputation that starts from "
            "input_ids; our own run differs by 2.9e-06",
        ),
        (
            report(unjudged("lm_head", "DIFFERS", math.inf)),
            "FAIL: first at lm_head: NaN or Inf where a recomputation that starts from input_ids "
            "has none, or the reverse",
        ),
        (
            report(result("model.norm", ratio=0.87), unjudged("lm_head")),
            "PASS: 62 of 63 sites, the others without recorded inputs; the largest error is 0.87 "
            "times what rounding allows, at model.norm",
        ),
        (
            report(result(Q_ROPE[2], "WARN", 40.0, note="rounds as A does: a table")),
            "WARN: none of 63 sites fails; 1 warns, the first at model.layers.2.self_attn.q_rope: "
            "rounds as A does: a table",
        ),
        (
            Report((unjudged("lm_head"),)),
            "SEEN: 1 site, none with recorded inputs; their errors look like those of rounding",
        ),
        (
            Report((unjudged("lm_head", difference=NOT_A_NUMBER),)),
            "NONE: nothing could be checked: of 1 site, none has recorded inputs",
        ),
    ],
)
def test_the_headline(made, expected):
    assert made.text(width=1000).splitlines()[0] == expected
    assert made.to_json()["headline"] == expected


def paragraphs(made, **options):
    return made.text(**options).split("\n\n")


def test_what_explains_a_failure_comes_next():
    other = Explanation("positions off by one", "It starts at 1.", 0.9)
    made = report(result(Q_ROPE[0], "FAIL", explanations=(INTERLEAVED, other)))
    assert paragraphs(made, width=1000)[1:4] == [
        "Likely cause: RoPE layout interleaved\n"
        "  It pairs 2i and 2i + 1.\n"
        "  So computed, the largest error is 0.41 times what rounding allows.",
        "Or: positions off by one\n"
        "  It starts at 1.\n"
        "  So computed, the largest error is 0.9 times what rounding allows.",
        "No other site fails.",
    ]


def test_what_the_cause_explains():
    assert paragraphs(interleaved(), width=1000)[2] == (
        "8 sites fail: self_attn.q_rope in layers 0-3, self_attn.k_rope in layers 0-3.\n"
        "The likely cause explains all of them."
    )
    other = Explanation("positions off by one", "It starts at 1.", 0.9)
    made = report(
        *(result(name, "FAIL", explanations=(INTERLEAVED,)) for name in Q_ROPE),
        result(K_ROPE[1], "FAIL", explanations=(other, INTERLEAVED)),
        result(K_ROPE[3], "FAIL", explanations=(other,)),
        result("lm_head", "FAIL"),
    )
    assert paragraphs(made, width=1000)[2] == (
        "7 sites fail: self_attn.q_rope in layers 0-3, self_attn.k_rope in layers 1 and 3, "
        "lm_head.\n"
        "The likely cause explains 5 of them; not self_attn.k_rope in layer 3, lm_head."
    )


def test_where_nothing_explains_it():
    said = "No mistake that is known here explains it."
    assert said in str(report(result(NORM, "FAIL")))
    assert said not in str(report(result(NORM, "FAIL"), diagnosed=False))
    differs = str(report(unjudged("lm_head", "DIFFERS")))
    assert said in differs
    assert "The sites between were not recorded" in differs
    assert said not in str(report(unjudged("lm_head", "DIFFERS", math.inf)))  # nothing was tried


def test_an_explanation_without_a_bound():
    made = report(unjudged("lm_head", "DIFFERS", explanations=(INTERLEAVED,)))
    assert paragraphs(made, width=1000)[1:3] == [
        "Likely cause: RoPE layout interleaved\n"
        "  It pairs 2i and 2i + 1.\n"
        "  So computed, it differs by 0.41 times what would still be SEEN.",
        "The sites between were not recorded; with them, the first wrong one would be found.",
    ]
    assert "it differs by 0.41 times what would still be SEEN." in to_html(made)


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(0.99999, "1.00"), (0.995, "1.00"), (0.994, "0.99"), (1.0, "1"), (1.0004, "1.0004")],
)
def test_a_correctly_rounded_sum_is_no_near_miss(ratio, shown):
    made = report(result("model.layers.2", ratio=ratio))
    headline = str(made).splitlines()[0]
    assert headline.endswith("no error is larger than rounding allows") == (0.9 < ratio <= 1)
    assert row(str(made), "layer output")[1] == shown
    said = "Above 1, rounding cannot explain the error. A result that is rounded once, such as a"
    assert said in made.text(width=1000)
    assert said in to_html(made)


def row(text, name):
    (found,) = (line for line in text.splitlines() if line.startswith(f"{name}  "))
    return found.removeprefix(name).split()


def test_a_line_for_each_role():
    made = report(
        result(Q_ROPE[1], "FAIL", 300.0),
        result(Q_ROPE[3], "FAIL", 400.0),
        result("model.layers.2", "WARN", 0.75, usual=2.5, note="large"),
        result("model.layers.3", ratio=0.875, usual=0.9),
        unjudged("lm_head", "DIFFERS", 0.5),
    )
    text = str(made)
    assert row(text, "site") == ["PASS", "WARN", "FAIL", "error/limit", "error/usual", "layer"]
    assert row(text, "self_attn.q_rope") == ["2", "2", "4e+02", "4e+02", "3"]
    assert row(text, "self_attn.k_rope") == ["4", "0.25", "0.25", "0"]
    assert row(text, "layer output") == ["3", "1", "0.88", "2.5", "2"]  # what warns, not 3
    assert row(text, "model.norm") == ["1", "0.25", "0.25"]
    assert row(text, "without recorded inputs") == [
        *("DIFFERS", "difference", "our", "own", "run", "layer")
    ]
    assert row(text, "lm_head") == ["1", "0.5", "1e-07"]


def test_a_line_for_each_site_on_demand():
    made = interleaved()
    assert "model.layers.3.mlp.act" not in made.text()
    (text,) = (part for part in paragraphs(made, every=True) if "verdict" in part.splitlines()[0])
    for name in SITES:
        assert row(text, name)[0] == ("FAIL" if name in Q_ROPE + K_ROPE else "PASS")
    assert row(text, Q_ROPE[2])[1:] == ["3e+02", "3e+02", "3e-05", "[0,", "5,", "3]"]


def test_notes_are_told_once():
    note = "rounds as A does: the table to bfloat16"
    made = report(*(result(name, "WARN", note=note) for name in [*Q_ROPE, K_ROPE[0], K_ROPE[2]]))
    noted = [part for part in paragraphs(made, width=1000)[1:] if note in part]
    assert noted == [
        "WARN self_attn.q_rope in layers 0-3, self_attn.k_rope in layers 0 and 2: "
        "rounds as A does: the table to bfloat16."
    ]


def test_missing_sites_are_told_by_role():
    missing = {
        "model.norm",
        "model.layers.3.mlp.act",
        *K_ROPE,
        *(f"model.layers.{i}" for i in range(4)),
    }
    missing |= {f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 3)}
    made = report()
    made = replace(
        made,
        results=tuple(r for r in made.results if r.site.name not in missing),
        missing=tuple(name for name in SITES if name in missing),
    )
    assert paragraphs(made, width=1000)[-2].splitlines() == [
        "Not recorded in any of 4 layers: self_attn.k_rope, layer output.",
        "Not recorded in layers 0-1 and 3: mlp.up_proj.",
        "Not recorded in layer 3: mlp.act.",
        "Not recorded: model.norm.",
    ]


def test_how_it_was_computed():
    made = report(result("lm_head", dtype="bfloat16"), seconds=1.23)
    assert paragraphs(made, width=1000)[-1] == (
        "63 sites checked in 1.2 s as float32 with sums in float32 at 62 sites; "
        "bfloat16 with sums in float32 at 1 site."
    )
    made = report(weights="bfloat16", profile="transformers")
    assert paragraphs(made, width=1000)[-1] == (
        "63 sites checked in 0.0 s as float32 with sums in float32, from weights in bfloat16, "
        "with the roundings of transformers."
    )


@pytest.mark.parametrize("width", [60, 80])
def test_lines_fit(width):
    note = "rounds as transformers does: the normalised row to bfloat16 before the weight"
    made = replace(
        interleaved(metadata={"engine": "x" * 200}),
        missing=tuple(SITES)[3:9],
    )
    made = replace(made, results=(*made.results[:-1], result("lm_head", "WARN", note=note)))
    lines = [line for line in made.text(width=width).splitlines() if "  " not in line.strip()]
    assert len(lines) > 12
    assert max(map(len, lines)) <= width
    assert max(map(len, made.text().splitlines())) <= 80  # the tables, too


def test_json_has_everything():
    made = interleaved(metadata={"engine": "mine"}, missing=("lm_head",), seconds=2.5)
    content = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert list(content)[:5] == ["verdict", "agrees", "exit_status", "headline", "first"]
    assert {field.name for field in fields(Report)} <= content.keys()
    for found in (content["first"], *content["results"]):
        assert found.keys() == {field.name for field in fields(SiteResult)}
    assert (content["verdict"], content["agrees"], content["exit_status"]) == ("FAIL", False, 1)
    assert content["first"] == content["results"][list(SITES).index(Q_ROPE[0])]
    assert content["first"]["site"]["name"] == Q_ROPE[0]
    assert content["first"]["site"]["role"] == "self_attn.q_rope"
    assert content["first"]["judgement"]["ratio"] == 300.0
    assert content["first"]["worst"] == [
        {"index": [0, 5, 3], "computed": 0.5, "exact": 0.25, "limit": 0.25 / 300}
    ]
    assert content["first"]["explanations"] == [
        {"name": "RoPE layout interleaved", "detail": "It pairs 2i and 2i + 1.", "ratio": 0.41}
    ]
    assert content["counts"] == {"PASS": 55, "WARN": 0, "FAIL": 8, "SEEN": 0, "DIFFERS": 0}
    assert content["metadata"] == {"engine": "mine"}
    assert content["missing"] == ["lm_head"]
    assert content["histogram_edges"] == list(EDGES)
    assert report().to_json()["first"] is None


def test_json_writes_null_for_nan_and_inf():
    judgement = Judgement(math.inf, math.inf, (0,), 0, 1)
    worst = (Element((0,), math.nan, -math.inf, math.inf),)
    made = Report((result(NORM, "FAIL", judgement=judgement, worst=worst),))
    (found,) = made.to_json()["results"]
    assert found["judgement"]["ratio"] is None
    assert found["worst"] == [{"index": [0], "computed": None, "exact": None, "limit": None}]
    json.dumps(made.to_json(), allow_nan=False)


@pytest.fixture(scope="module")
def checked():
    """A small model's trace with one element of one site spoilt, and what a check reports."""
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    trace = record(model, np.array([[1, 2, 3, 4]]))
    spoilt = np.array(trace.arrays[NORM])
    spoilt[0, 2, 7] += 0.5
    told = []
    trace = replace(trace, arrays=dict(trace.arrays) | {NORM: spoilt})
    return check(trace, model, explain=False, progress=told.append), told


def test_a_check_fills_it(checked):
    made, told = checked
    assert tuple(told) == made.results
    assert (made.weights, made.profile, made.diagnosed) == ("float32", "contract", False)
    assert made.first.site.name == NORM
    assert made.first.worst[0].index == (0, 2, 7)
    assert ": port " in str(made)


def test_histograms_count_every_element_and_end_at_the_worst(checked):
    made, _ = checked
    for found in made.results:
        assert sum(found.histogram) == math.prod(found.shape)
        assert len(found.histogram) == len(EDGES) + 1
        last = max(i for i, count in enumerate(found.histogram) if count)
        assert last == bin_of(found.judgement.ratio)
        assert (last > EDGES.index(1.0)) == (found.verdict == "FAIL")


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        *((0.0, 0), (1e-9, 1), (1e-3, 1), (0.5, 4), (1.0, 4), (1.001, 5), (1e4, 8), (2e4, 9)),
        *((math.inf, 9), (math.nan, 9)),
    ],
)
def test_bins(ratio, expected):
    assert bin_of(ratio) == expected


@pytest.mark.parametrize(
    ("computed", "limit", "ratio"),
    [(0.75, 0.125, 4.0), (-0.25, 0.25, 2.0), (0.25, 0.125, 0.0), (0.25, 0.0, 0.0)],
)
def test_the_error_of_an_element_over_its_limit(computed, limit, ratio):
    assert Element((0,), computed, 0.25, limit).ratio == ratio
    assert Element((0,), 0.5, 0.25, 0.0).ratio == math.inf


@pytest.mark.parametrize(
    ("first", "second", "texts"),
    [
        (0.5, 0.25, ("0.5", "0.25")),
        (0.12345678, 0.12345679, ("0.12345678", "0.12345679")),
        (9.0, math.nextafter(9.0, 10.0), ("9", "9.000000000000002")),
        (1.0, math.nextafter(1.0, 2.0), ("1.0", "1.0000000000000002")),
        (0.25, 0.25, ("0.25", "0.25")),
    ],
)
def test_two_numbers_have_the_digits_that_tell_them_apart(first, second, texts):
    assert apart(first, second) == texts


def test_a_difference_of_zero_is_shown_before_an_unknown_one():
    made = report(
        unjudged(Q_ROPE[0], difference=math.nan), unjudged(Q_ROPE[1], difference=0.0, yardstick=0.0)
    )
    assert "unknown" not in made.text()
    assert made.seconds == 0
    with pytest.raises(TypeError, match="positional argument"):
        made.text(True)
