"""`compare`: where two traces come apart, and what of that is inherited."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import LlamaConfig
from llama_layers.config.families import FAMILIES
from llama_layers.errors import TraceError
from llama_layers.verify import Trace, compare, distance, sites
from tests.support.compared_traces import F32, IDS, LAYER, by_name, made, traced, without_config
from tests.support.random_models import CONFIGS, GQA, random_weights


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("known", [True, False], ids=["config", "no config"])
def test_right_runs_agree(kind, known):
    config = CONFIGS[kind]
    single, double = traced(config), traced(config, dtype=np.float64)
    if not known:
        single, double = without_config(single), without_config(double)
    comparison = compare(double, single)
    assert comparison.agrees, str(comparison)
    assert len(comparison.results) == len(single.arrays)
    assert 0 < max(result.difference for result in comparison.results) < 1e-3
    assert (comparison.verdict, comparison.exit_status) == ("AGREE", 0)
    same = compare(single, single)
    assert {result.difference for result in same.results} == {0.0}
    assert same.agrees


@pytest.mark.parametrize("family", FAMILIES)
def test_names_tell_a_family(family):
    sizes = "vocab_size hidden_size intermediate_size num_attention_heads head_dim rms_norm_eps"
    sizes = (sizes + " rope_theta max_position_embeddings").split()
    known = {name: getattr(GQA, name) for name in sizes}
    config = LlamaConfig(model_type=family, num_hidden_layers=3, **known)
    names = [site.name for site in sites(config) if not (site.pairwise or site.name == "logprobs")]
    trace = Trace({name: np.ones((1, 7, 1), np.float32) for name in names}, np.ones((1, 7), int))
    comparison = compare(trace, trace)
    assert {result.site.name for result in comparison.results} == set(names)


SUSPECTS = {
    "self_attn.k_proj.weight": "self_attn.k_proj",
    "input_layernorm.weight": "input_layernorm",
    "self_attn.o_proj.weight": "self_attn.o_proj",
    "mlp.up_proj.weight": "mlp.up_proj",
}


@pytest.mark.parametrize("weight", SUSPECTS)
@pytest.mark.parametrize("known", [True, False], ids=["config", "no config"])
def test_the_first_suspect_is_where_they_part(weight, known):
    weights = random_weights(GQA)
    wrong = dict(weights)
    wrong[f"{LAYER}.{weight}"] = weights[f"{LAYER}.{weight}"] * 1.001
    a, b = traced(GQA, weights), traced(GQA, wrong)
    if not known:
        a, b = without_config(a), without_config(b)
    comparison = compare(a, b)
    assert comparison.first.site.name == f"{LAYER}.{SUSPECTS[weight]}"
    assert comparison.first.difference == pytest.approx(1e-3, rel=0.01)
    assert comparison.suspects[0] is comparison.first
    assert (comparison.verdict, comparison.exit_status) == ("DIVERGE", 1)
    # What follows differs as much, and inherits it.
    assert len(comparison.suspects) < 4
    assert by_name(comparison)["lm_head"].difference > 1e-6


def test_the_difference_is_that_of_the_norms_of_tokens(rng, monkeypatch):
    x, y = rng.standard_normal((2, 2, 7, 5)).astype(np.float32)
    tokens = np.linalg.norm(x.astype(float) - y, axis=-1) / np.linalg.norm(x.astype(float), axis=-1)
    expected = np.sqrt(np.mean(tokens**2))
    pair = Trace({"model.norm": x}, IDS), Trace({"model.norm": y}, IDS)
    assert compare(*pair).results[0].difference == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(distance, "_BLOCK", 12)  # a row of the batch at a time
    assert compare(*pair).results[0].difference == pytest.approx(expected, rel=1e-12)


def test_what_is_not_allowed_is_in_neither_norm(rng):
    x, y = rng.standard_normal((2, 7, 5))
    allowed = rng.random((7, 5)) < 0.5
    allowed[:, 0] = True
    tokens = [
        np.linalg.norm((a - b)[which]) / np.linalg.norm(a[which])
        for a, b, which in zip(x, y, allowed, strict=True)
    ]
    found = distance.distance_by_token(x, y, allowed)
    assert found == pytest.approx(np.sqrt(np.mean(np.square(tokens))), rel=1e-12)


def test_the_distance_of_whole_arrays(rng):
    x, y = rng.standard_normal((2, 2, 7, 5))
    expected = np.linalg.norm(x - y) / np.linalg.norm(x)
    assert distance.distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_a_token_of_zeros_is_held_against_the_others(rng):
    x = rng.standard_normal((3, 4))
    x[1] = 0.0
    y = x.copy()
    y[1, 2] = 0.5
    average = np.sqrt(np.sum(np.square(x)) / 3)
    found = distance.distance_by_token(x, y)
    assert found == pytest.approx(0.5 / average / np.sqrt(3), rel=1e-12)


def test_a_token_of_large_activations_hides_no_other(rng):
    """The norm makes all tokens alike, and so shows what the others differ by."""
    stream = rng.standard_normal((1, 8, 16))
    stream[0, 0] *= 1e4
    other = stream * (1 + 1e-3 * rng.standard_normal(stream.shape))
    other[0, 0] = stream[0, 0]
    traces = []
    for x in (stream, other):
        norm = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
        traces.append(Trace({"model.layers.0": x, "model.layers.1.input_layernorm": norm}))
    assert compare(*traces).results[1].factor < 2


def test_bfloat16_is_widened():
    ones = np.ones((1, 2, 300), ml_dtypes.bfloat16)
    pair = Trace({"model.norm": ones}), Trace({"model.norm": ones * ml_dtypes.bfloat16(1.5)})
    (found,) = compare(*pair).results
    assert found.difference == 0.5
    assert found.dtypes == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1.0], math.inf),
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([3.0, math.inf], [4.0, math.inf], 1 / 3),
        ([1.0, math.nan], [1.0, 1.0], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([1e200, 1e200], [1e200, -1e200], math.inf),
    ],
)
def test_odd_numbers(a, b, expected):
    pair = (Trace({"model.norm": np.array([[row]])}) for row in (a, b))
    assert compare(*pair).results[0].difference == pytest.approx(expected, rel=1e-12)


def test_what_follows_a_nan_is_no_suspect():
    differences = {f"{LAYER}.input_layernorm": math.nan, f"{LAYER}.self_attn.q_proj": math.nan}
    comparison = compare(*made(differences))
    assert [s.site.name for s in comparison.suspects] == [f"{LAYER}.input_layernorm"]
    assert [r.added for r in comparison.results] == [math.inf, 0.0]


INHERITED = {
    # site: differences of the others, and which of those it inherits
    "self_attn.q_proj": ({"input_layernorm": 0.25, "self_attn.k_proj": 0.5}, ["input_layernorm"]),
    "self_attn.attention": (
        {"self_attn.q_rope": 0.5, "self_attn.k_rope": 0.25, "self_attn.v_proj": 0.125},
        ["self_attn.q_rope", "self_attn.k_rope", "self_attn.v_proj"],
    ),
    "attention_residual": (
        {"self_attn.attention": 1.0, "self_attn.o_proj": 0.25, "": 4.0},
        ["self_attn.o_proj"],
    ),
    "mlp.act": ({"mlp.gate_proj": 0.25, "mlp.up_proj": 0.5}, ["mlp.gate_proj", "mlp.up_proj"]),
    "mlp.down_proj": ({"post_attention_layernorm": 0.5}, ["post_attention_layernorm"]),
}


@pytest.mark.parametrize("role", INHERITED)
def test_what_is_inherited(role):
    others, expected = INHERITED[role]
    names = {f"{LAYER}.{name}".rstrip("."): by for name, by in others.items()}
    pair = made(names | {f"{LAYER}.{role}": 3.0, "model.layers.3.mlp.act": 8.0})
    found = by_name(compare(*pair))[f"{LAYER}.{role}"]
    assert found.inputs == tuple(f"{LAYER}.{name}" for name in expected)
    assert found.inherited == max(others[name] for name in expected)
    assert found.difference == 3.0
    assert found.added == 3.0 - found.inherited


def test_the_most_local_way_is_taken():
    names = [f"{LAYER}.self_attn.{name}" for name in ("q_rope", "k_rope", "v_proj", "attention")]
    shapes = [(1, 3, 4, 2), (1, 3, 4, 2), (1, 3, 8), (1, 3, 4, 2)]
    a = {name: np.ones(shape) for name, shape in zip(names, shapes, strict=True)}
    a[f"{LAYER}.self_attn.probabilities"] = np.ones((1, 4, 3, 3))
    b = dict(a) | {names[0]: 2 * a[names[0]]}
    found = by_name(compare(Trace(a), Trace(b)))
    assert found[f"{LAYER}.self_attn.probabilities"].inherited == 1.0
    assert found[f"{LAYER}.self_attn.attention"].inputs == (
        f"{LAYER}.self_attn.probabilities",
        f"{LAYER}.self_attn.v_proj",
    )
    assert found[f"{LAYER}.self_attn.attention"].inherited == 0.0


def test_sites_between_are_counted():
    differences = {"model.layers.0": 0.25, "model.layers.1": 0.5, "model.norm": 2.0}
    found = by_name(compare(*made(differences)))
    assert found["model.layers.0"].inputs == ("input_ids",)
    assert found["model.layers.1"].inputs == ("model.layers.0",)
    assert found["model.layers.1"].inherited == 0.25
    # A layer has 14 other sites without pairs of tokens, and scores and probabilities are none.
    assert found["model.layers.1"].roundoff == pytest.approx(F32 * math.sqrt(15))
    assert found["model.norm"].inputs == ("model.layers.1",)  # the last that the names tell of
    assert found["model.norm"].roundoff == F32


@pytest.mark.parametrize(("factor", "suspect"), [(9.0, False), (11.0, True)])
def test_ten_times_is_a_suspect(factor, suspect):
    differences = {f"{LAYER}.mlp.act": 0.25, f"{LAYER}.mlp.down_proj": factor * 0.25}
    found = by_name(compare(*made(differences, np.float64)))[f"{LAYER}.mlp.down_proj"]
    assert found.factor == pytest.approx(factor)
    assert found.suspect is suspect
    # With nothing inherited, roundings of the coarser format count.
    wide, half = np.ones((1, 1, 1)), np.ones((1, 1, 1), np.float16)
    a, b = Trace({"model.embed_tokens": wide}), Trace({"model.embed_tokens": half})
    assert compare(a, b).results[0].roundoff == compare(b, a).results[0].roundoff == 2.0**-11
    a, b = Trace({"model.embed_tokens": wide}), Trace({"model.embed_tokens": wide + factor / 2**53})
    assert compare(a, b).results[0].suspect is suspect


def test_metadata_may_tell_a_coarser_format():
    a, b = made({f"{LAYER}.mlp.act": 0.0, f"{LAYER}.mlp.down_proj": 0.03})
    assert not compare(a, b).agrees
    told = replace(b, metadata={"dtype": "bfloat16"})
    comparison = compare(a, told)
    assert comparison.agrees
    assert comparison.results[-1].dtypes == ("float32", "bfloat16")
    assert comparison.results[-1].roundoff == 2.0**-8


def test_padding_does_not_count():
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    a = traced(attention_mask=mask)
    spoilt = {name: np.array(array) for name, array in a.arrays.items()}
    for array in spoilt.values():
        array[1, :2] = math.nan
    assert compare(a, replace(a, arrays=spoilt)).agrees
    spoilt["lm_head"][1, 2] += 1
    assert compare(a, replace(a, arrays=spoilt)).first.site.name == "lm_head"


@pytest.mark.parametrize("known", [True, False], ids=["config", "no config"])
def test_scores_of_later_tokens_do_not_count(known):
    a = traced(CONFIGS["window"], sites=["scores", "probabilities"])
    name = "model.layers.0.self_attn.scores"
    above = np.array(a.arrays[name])
    above[..., 1, 3] = -1e30
    inside = np.array(a.arrays[name])
    inside[..., 3, 1] += 1
    before = np.array(a.arrays[name])
    before[..., 4, 1] += 1  # the window is three
    if not known:
        a = without_config(a)
    assert compare(a, replace(a, arrays=dict(a.arrays) | {name: above})).agrees
    assert not compare(a, replace(a, arrays=dict(a.arrays) | {name: inside})).agrees
    assert compare(a, replace(a, arrays=dict(a.arrays) | {name: before})).agrees is known


def test_logits_of_the_last_token_only():
    a = traced()
    last = replace(a, arrays=dict(a.arrays) | {"lm_head": np.array(a.arrays["lm_head"][:, -1:])})
    for pair in ((a, last), (last, a), (without_config(a), without_config(last))):
        assert by_name(compare(*pair))["lm_head"].difference == 0.0
    wrong = replace(last, arrays=dict(last.arrays) | {"lm_head": a.arrays["lm_head"][:, :1]})
    assert compare(a, wrong).first.site.name == "lm_head"


def test_a_config_lets_heads_be_spelt_otherwise():
    a = traced()
    name = f"{LAYER}.self_attn.q_proj"
    apart = replace(
        a, arrays=dict(a.arrays) | {name: a.arrays[name].reshape(2, 5, 4, 4)}, metadata={}
    )
    assert compare(a, apart).agrees
    assert compare(apart, a).agrees
    with pytest.raises(TraceError, match=r"q_proj: expected the same shape in both traces, got "):
        compare(without_config(a), apart)


def test_sites_of_one_trace_are_named():
    a, b = traced(sites=["q_proj", "mlp.act", "lm_head"]), traced(sites=["q_proj", "k_proj"])
    comparison = compare(a, b)
    assert [r.site.role for r in comparison.results] == 2 * ["self_attn.q_proj"]
    assert comparison.only_a == ("model.layers.0.mlp.act", "model.layers.1.mlp.act", "lm_head")
    assert comparison.only_b == tuple(f"model.layers.{i}.self_attn.k_proj" for i in (0, 1))
    text = comparison.text(width=1000)
    assert (
        "Only in the first trace: model.layers.0.mlp.act, model.layers.1.mlp.act, lm_head.\n"
        "Only in the second trace: model.layers.0.self_attn.k_proj, "
        "model.layers.1.self_attn.k_proj.\n"
    ) in text


def test_tokens_may_be_told_by_one_trace_only():
    a = traced()
    b = replace(a, input_ids=None, positions=None)
    assert compare(a, a).same_tokens
    comparison = compare(a, b)
    assert not comparison.same_tokens
    assert "taken to be of the same tokens" in str(comparison)
    assert "taken to be of the same tokens" not in str(compare(a, a))


def refused(a, b, message):
    with pytest.raises(TraceError) as error:
        compare(a, b)
    assert message in str(error.value)


def test_refusals():
    a = traced()
    other_ids = IDS.copy()
    other_ids[1, 2] = 7
    refused(
        a,
        replace(a, input_ids=other_ids),
        "input_ids: expected the same in both traces, got 3 and 7 at [1, 2]",
    )
    refused(
        without_config(a),
        Trace({"lm_head": np.ones((2, 3, 13))}, IDS[:, :3]),
        "input_ids: expected the same in both traces, got shapes [2, 5] and [2, 3]",
    )
    refused(
        a,
        replace(a, positions=np.arange(1, 6)),
        "positions: expected the same in both traces, got 0 and 1 at [0, 0]",
    )
    refused(
        replace(a, attention_mask=np.ones((2, 5), bool)),
        replace(a, attention_mask=np.array(2 * [[0, 1, 1, 1, 1]])),
        "attention_mask: expected the same in both traces, got True and 0 at [0, 0]",
    )
    refused(
        a,
        traced(CONFIGS["mha"]),
        "trace: expected one of this model, with num_key_value_heads 2, got 4",
    )
    refused(
        *made({"model.norm": 0.0, "model.layers.0.mlp.akt": 0.0}),
        "got 'model.layers.0.mlp.akt' (is it 'model.layers.0.mlp.act'?)",
    )
    refused(
        *(Trace({name: np.ones((1, 3, 4))}) for name in ("model.norm", "lm_head")),
        "traces: expected at least one site that both have, got none",
    )
    refused(
        *(Trace({"model.norm": np.ones((1, 3, n))}) for n in (4, 5)),
        "model.norm: expected the same shape in both traces, got [1, 3, 4] and [1, 3, 5]",
    )
    refused(
        *(Trace({"model.norm": np.ones((1, 3, 4), int)}) for _ in "ab"),
        "model.norm: expected one of the dtypes float16, bfloat16, float32, float64, got int64",
    )
    refused(a, replace(a, metadata={"config": "{"}), "metadata config: expected a config.json")
    with pytest.raises(TypeError, match="trace_b: expected a Trace, got dict"):
        compare(a, {})
