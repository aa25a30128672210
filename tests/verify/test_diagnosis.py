"""Which sites are diagnosed, what their causes have in common, and when a habit is none."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from llama_layers import forward
from llama_layers.layers.sites import sites
from llama_layers.verify import Explanation, Report, Trace, check, record, to_html
from llama_layers.verify.habits import Habits
from llama_layers.verify.report.patterns import joined_causes
from llama_layers.verify.report.results import SiteResult
from tests.support.ported import BASE, omega, turned
from tests.support.random_models import model_of, random_weights

DEEP = replace(BASE, num_hidden_layers=6)
WEIGHTS = random_weights(DEEP, 0, np.float32)
MODEL = model_of(DEEP, WEIGHTS)
IDS = np.random.default_rng(2).integers(0, DEEP.vocab_size, (1, 12))


def traced(change, weights=WEIGHTS):
    """A trace of a port that changes some of its arrays."""
    arrays = {}

    def tap(name, array):
        arrays[name] = change(name, array, arrays).astype(array.dtype).reshape(array.shape)
        return arrays[name]

    forward(model_of(DEEP, weights), IDS, tap=tap)
    return Trace(arrays, IDS)


def causes(report):
    return {r.site.name: [e.name for e in r.explanations] for r in report.failures}


def test_every_site_is_diagnosed_whatever_explains_others():
    """Four faults of one role that nothing explains, and a fifth that a mistake does."""
    noise = np.random.default_rng(3)

    def change(name, array, arrays):
        if not name.endswith("q_proj"):
            return array
        layer = int(name.split(".")[2])
        return array * 1.25 if layer == 5 else array * noise.uniform(0.5, 1.5, array.shape)

    found = causes(check(traced(change), MODEL))
    assert len(found) == 6
    assert found.pop("model.layers.5.self_attn.q_proj") == ["everything scaled"]
    assert set(map(tuple, found.values())) == {()}


def test_positions_that_advance_by_one_a_layer():
    def change(name, array, arrays):
        if not name.endswith(("q_rope", "k_rope")):
            return array
        x = arrays[name.replace("rope", "proj")].reshape(array.shape)
        places = np.arange(12) + int(name.split(".")[2])
        return turned(x, np.outer(places, omega(DEEP)))

    text = check(traced(change), MODEL).text(width=1000)
    assert (
        "RoPE at other positions, at self_attn.q_rope in layers 2-5, self_attn.k_rope in layers "
        "2-5: The port seems to rotate tokens 0..11 at positions i..i + 11 instead of positions "
        "0..11; if that is meant, the trace should have positions." in text
    )


def test_a_layer_late():
    """Each layer but the last has the weights of the one after it."""
    weights = dict(WEIGHTS)
    for layer, after in pairwise(range(6)):
        start = f"model.layers.{layer}."
        for name in (name for name in weights if name.startswith(start)):
            weights[name] = WEIGHTS[name.replace(start, f"model.layers.{after}.")]
    text = check(traced(lambda name, array, arrays: array, weights), MODEL).text(width=1000)
    (line,) = (line for line in text.splitlines() if "layer i" in line)
    assert line.startswith("another layer's weights, at input_layernorm in layers 0-4, self_attn.q")
    assert "mlp.down_proj in layers 0-4: " in line
    assert line.endswith("have the weights of layer i + 1; it should have those of layer i.")
    assert "The likely cause explains all of them." in text


def result(layer, detail, name="mine", role="mlp.act"):
    site = next(s for s in sites(DEEP) if s.name == f"model.layers.{layer}.{role}")
    explained = (Explanation(name, detail, 0.5),)
    return SiteResult(
        site, "FAIL", (1,), "float32", "float32", (), None, 1.0, explanations=explained
    )


def test_numbers_that_follow_no_layer():
    """Numbers with a point stay as they are."""
    one = [result(i, "Adds 1e-05 to 3.") for i in (0, 1, 3)]
    first = result(0, "Adds 2.", "theirs")
    one = [result(i, "Adds 1e-05 to 3.") for i in (0, 1, 3)]
    said = ["mine, at mlp.act in layers 0-1 and 3: Adds 1e-05 to 3."]
    assert list(joined_causes([first, *one])) == said
    other = [result(i, f"Adds {i * i}.") for i in range(3)]
    assert list(joined_causes([first, *other])) == ["mine, at mlp.act in layers 0-2."]
    assert list(joined_causes([result(4, "Adds 2.")])) == []


def test_what_is_told_of_the_first_site_is_told_once():
    assert list(joined_causes([result(i, "Adds 1e-05 to 3.") for i in (0, 1, 3)])) == []
    assert list(joined_causes([result(i, f"Adds {i * i}.") for i in range(3)])) == []


def test_one_cause_of_two_roles():
    found = [result(i, "Adds 3.", role=role) for role in ("mlp.act", "mlp.up_proj") for i in (0, 1)]
    where = "mlp.act in layers 0-1, mlp.up_proj in layers 0-1"
    assert list(joined_causes([result(0, "x", "theirs"), *found])) == [f"mine, at {where}: Adds 3."]


def test_no_time(monkeypatch):
    module = sys.modules["llama_layers.verify.check"]
    monkeypatch.setattr(module, "SECONDS", -1.0 - module.AGAIN)
    doubled = traced(lambda name, array, arrays: 2 * array if name == "model.norm" else array)
    (failure,) = check(doubled, MODEL).failures
    assert failure.explanations == ()
    assert failure.note == "there was no time to look for what explains it"


def test_a_search_that_is_stopped(monkeypatch):
    """The first site begins in time, and time runs out there."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sys.modules["llama_layers.verify.check"], "SECONDS", 30.0)

    def clock(result):
        now[0] = 100.0

    doubled = traced(lambda name, array, arrays: 2 * array if name == "model.norm" else array)
    report = check(doubled, MODEL, diagnosing=clock)
    said = "The search for what explains it was stopped after 30 s"
    assert report.first.explanations == ()
    assert report.first.stopped == report.to_json()["first"]["stopped"] == 30.0
    for text in (report.text(width=999), to_html(report)):
        assert said in text
        assert "No mistake that is known" not in text


def test_a_cause_of_other_sites_is_told_as_theirs():
    found = [result(i, "Adds 3.", role="mlp.act") for i in (1, 2)]
    unknown = replace(result(0, ""), explanations=())
    said = str(Report((unknown, *found)))
    assert "Likely cause at other sites: mine, at mlp.act in layers 1-2: Adds 3." in said


def test_powers_of_ten_are_told_as_they_are():
    found = [result(i, "Takes 1e+06; not 1e-05.", role="mlp.act") for i in (0, 1)]
    (said,) = joined_causes([result(0, "x", "theirs"), *found])
    assert said.endswith("Takes 1e+06; not 1e-05.")


def test_it_is_said_what_is_diagnosed():
    doubled = traced(lambda name, array, arrays: 2 * array if name == "model.norm" else array)
    told = []
    check(doubled, MODEL, diagnosing=told.append)
    assert [r.site.name for r in told] == ["model.norm"]
    check(doubled, MODEL, diagnosing=told.append, explain=False)
    assert len(told) == 1


BFLOAT16 = ml_dtypes.bfloat16


def rounded(wrong, layers, config=DEEP, weights=WEIGHTS):
    """A port in bfloat16 whose norm is wrong in some layers."""
    model = model_of(config, {n: w.astype(BFLOAT16) for n, w in weights.items()})
    arrays, last = {}, {}

    def tap(name, array):
        if name.endswith(".input_layernorm") and int(name.split(".")[2]) in layers:
            layer = int(name.split(".")[2])
            x = last["x"].astype(np.float64)
            weight = weights[f"{name}.weight"].astype(BFLOAT16).astype(np.float64)
            array = wrong(x, weight).astype(np.float32)
            assert layer < 6
        arrays[name] = array.astype(BFLOAT16)
        if name == "model.embed_tokens" or name.count(".") == 2:
            last["x"] = arrays[name].astype(np.float32)
        return arrays[name].astype(np.float32)

    forward(model, IDS, tap=tap)
    return check(Trace(arrays, IDS), model)


def row_first(x, weight):
    """As transformers: the row is rounded before it is scaled."""
    row = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + DEEP.rms_norm_eps)
    return row.astype(BFLOAT16).astype(np.float64) * weight


def test_a_habit_shows_in_most_layers():
    for layers, remarked in ((range(6), False), ([3], True)):
        results = [r for r in rounded(row_first, layers).results if r.profile]
        assert {r.site.layer for r in results} == set(layers)
        assert {r.verdict for r in results} == {"WARN"}
        notes = {"which shows at 1 of 6 such sites" in r.note for r in results}
        assert notes == {remarked}


@pytest.mark.parametrize(("elsewhere", "rare"), [(6, False), (1, True)])
@pytest.mark.parametrize("other", ["self_attn.k_proj", "self_attn.v_proj"])
def test_a_habit_of_other_roles_is_no_rare_one(elsewhere, rare, other):
    """Only if it shows at few of their sites, too."""
    roles = {"self_attn.q_proj": 1, other: elsewhere, "self_attn.o_proj": 0}
    shown = Counter({(role, "theirs"): count for role, count in roles.items() if count})
    habits = Habits(shown, Counter(dict.fromkeys(roles, 6)), {})
    site = next(s for s in sites(DEEP) if s.role == "self_attn.q_proj")
    one = SiteResult(site, "WARN", (1,), "float32", "float32", (), None, 1.0, profile="theirs")
    assert habits.is_rare(one) is rare


def another_eps(x, weight):
    """Which moves numbers to the next ones of bfloat16, and hardly any of them farther."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def test_where_a_mistake_and_a_habit_fit_both_are_said():
    habit = "rounds as transformers with sdpa does"
    # The residual stream stays as large as the embedding, and so does what eps changes.
    small = {n: w * np.float32(1e-3) for n, w in WEIGHTS.items() if "o_proj" in n or "down" in n}
    size = float(np.mean(np.square(WEIGHTS["model.embed_tokens.weight"][IDS])))
    config = replace(DEEP, rms_norm_eps=3e-3 * size)
    for layers, verdict in ((range(6), "WARN"), ([3], "FAIL")):
        report = rounded(another_eps, layers, config, WEIGHTS | small)
        result = report.first if verdict == "FAIL" else next(r for r in report.results if r.profile)
        assert (result.verdict, result.site.layer) == (verdict, layers[0])
        assert {cause.name for cause in result.explanations} == {"another eps"}
        assert habit in result.note
        assert "another eps" in result.note or verdict == "FAIL"
        for said in (report.text(width=1000), to_html(report), json.dumps(report.to_json())):
            assert habit in said
            assert "another eps" in said


def test_nothing_more_is_said_of_a_habit_that_no_mistake_explains():
    for result in rounded(row_first, range(6)).results:
        assert result.explanations == ()
        assert "as well" not in result.note


def test_a_habit_of_the_engine_that_the_trace_names_passes():
    trace = record(MODEL, IDS, positions=np.arange(12) + 100000)
    phases = (trace.positions[..., None] * omega(DEEP).astype(np.float32)).astype(np.float32)
    arrays = dict(trace.arrays)
    for name in arrays:
        if name.endswith("_rope"):
            x = arrays[name.replace("rope", "proj")].reshape(arrays[name].shape)
            arrays[name] = turned(x, phases.reshape(12, -1).astype(np.float64)).astype(np.float32)
    roles = ["self_attn.q_proj", "self_attn.q_rope"]
    arrays = {n: a for n, a in arrays.items() if n.partition("layers.")[2][2:] in roles}
    for engine, verdict in (("transformers 5.0", "PASS"), ("mine", "WARN")):
        report = check(replace(trace, arrays=arrays, metadata={"engine": engine}), MODEL)
        found = [r for r in report.results if r.profile == "float32 phases"]
        assert found
        assert {r.verdict for r in found} == {verdict}
        assert all(r.note.startswith("rounds as float32 phases does") for r in found)
        assert all(r.ratio <= 1 for r in found if verdict == "PASS")
