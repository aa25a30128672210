"""What a check holds each site against, and what it makes of several that fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_layers.errors import TraceError
from llama_layers.verify import check, record, sites
from tests.support.mistakes import Mistake
from tests.support.ported import BASE, CONFIGS, COUNT, WEIGHTS, omega, run, softmax, turned
from tests.support.random_models import GQA, model_of, random_weights

NAMES = [site.name for site in sites(GQA) if not site.optional]
RIGHT = Mistake("none", "input_layernorm", lambda p: p.right)


def result_of(report, name):
    (result,) = (result for result in report.results if result.site.name == name)
    return result


def changed(trace, **arrays):
    return replace(trace, arrays=dict(trace.arrays) | arrays)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_fails(number):
    model = model_of(GQA, random_weights(GQA, 0, np.float32))
    trace = record(model, np.array([[3, 1, 4, 1]]))
    for name in NAMES:
        array = trace.arrays[name].copy()
        array.ravel()[7] = number
        found = check(changed(trace, **{name: array}), model, explain=False).first
        assert (found.site.name, found.verdict) == (name, "FAIL")
        assert found.judgement.index == np.unravel_index(7, array.shape)


def test_layers_with_mistakes_of_their_own():
    trace, model = run(RIGHT)
    phases = np.outer(np.arange(COUNT), omega(BASE))
    names = [f"model.layers.{layer}.self_attn." for layer in range(3)]
    queries = [trace.arrays[f"{n}q_proj"].reshape(2, COUNT, 4, 8) for n in names]
    wrong = (
        turned(queries[0], phases, sign=-1),
        turned(queries[1], phases, layout="interleaved"),
        turned(queries[2], phases, sign=-1),
    )
    arrays = {f"{n}q_rope": y.astype(np.float32) for n, y in zip(names, wrong, strict=True)}
    report = check(changed(trace, **arrays), model)
    told = [[e.name for e in result_of(report, name).explanations] for name in arrays]
    other = "RoPE rotated the other way"
    assert told == [[other], ["RoPE layout interleaved"], [other]]


def test_the_last_token_with_a_mistake():
    """Logits of it alone are held against the last of all other tokens."""
    trace, model = run(RIGHT)
    stream = trace.arrays["model.layers.2"][:, -1:]
    logits = stream @ WEIGHTS["base"]["lm_head.weight"].T
    report = check(changed(trace, lm_head=logits), model)
    assert report.first.site.name == "lm_head"
    assert [e.name for e in report.first.explanations] == ["input not normalised"]


@pytest.mark.parametrize("role", ["self_attn.q_rope", "self_attn.k_rope"])
def test_rope_of_padding_may_be_anything_where_it_has_no_position(role):
    def wrong(p):
        y = p.right.copy()
        y[1, :4] = 7.0
        return y

    trace, model = run(Mistake("none", role, wrong, padded=True))
    assert check(trace, model).agrees
    counted = np.maximum(np.cumsum(trace.attention_mask, axis=1) - 1, 0)
    report = check(replace(trace, positions=counted), model, explain=False)
    assert [result.site.role for result in report.failures] == [role]
    found = report.first
    array = trace.arrays[found.site.name]
    array[1, 4] += 1  # the first that is not padding
    assert check(trace, model, explain=False).first.site.role == role


@pytest.mark.parametrize("role", ["scores", "probabilities"])
def test_pairs_of_padding(role):
    """A padded query may see anything; what others see is held against the mask."""
    config = CONFIGS["base"]
    trace, model = run(RIGHT._replace(padded=True))
    layer = record(model, trace.input_ids, attention_mask=trace.attention_mask, sites=[role])
    name = f"model.layers.1.self_attn.{role}"
    q, k = (trace.arrays[f"model.layers.1.self_attn.{n}_rope"] for n in "qk")
    k = np.repeat(k, config.num_attention_heads // config.num_key_value_heads, axis=2)
    scores = np.einsum("bshd,bthd->bhst", q.astype(float), k) / np.sqrt(config.head_dim)
    seen = np.tri(COUNT, dtype=bool) & trace.attention_mask[:, None, None, :]
    array = np.where(seen, scores, -np.inf)
    array = (array if role == "scores" else softmax(array)).astype(np.float32)
    assert array.shape == layer.arrays[name].shape
    for queries, padding, verdict in ((slice(4), 0.25, "PASS"), (slice(4, 5), 0.25, "FAIL")):
        theirs = array.copy()
        theirs[1, :, queries, :5] = padding
        found = result_of(check(changed(trace, **{name: theirs}), model, explain=False), name)
        assert found.verdict == verdict
    recorded = layer.arrays[name]
    shown = seen & trace.attention_mask[:, None, :, None]
    shown = np.broadcast_to(shown, recorded.shape)
    np.testing.assert_allclose(recorded[shown], array[shown], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["base", "window", "some windows"])
def test_probabilities_are_recorded_of_what_is_seen(kind, padded):
    trace, model = run(RIGHT._replace(config=kind, padded=padded))
    keep = np.ones((2, COUNT), bool) if not padded else trace.attention_mask
    found = record(model, trace.input_ids, attention_mask=trace.attention_mask, sites=["prob*"])
    for layer in range(3):
        window = CONFIGS[kind].window_of(layer)
        query, key = np.mgrid[:COUNT, :COUNT]
        seen = (key <= query) & (query - key < (window or COUNT))
        seen = seen & keep[:, None, :]
        array = found.arrays[f"model.layers.{layer}.self_attn.probabilities"]
        assert np.array_equal(array.min(axis=1)[keep] > 0, seen[keep])


OTHER = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 9.0,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "sliding_window": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize("key", OTHER)
def test_a_trace_of_another_config(key):
    """Whichever of the two says what the other leaves out."""
    models = []
    for config in (GQA, replace(GQA, **{key: OTHER[key]})):
        model = model_of(config, random_weights(config, 0, np.float32))
        models.append((model, record(model, np.array([[3, 1, 4, 1]]))))
    (one, its_trace), (other, their_trace) = models
    for model, trace in ((one, their_trace), (other, its_trace)):
        with pytest.raises(TraceError, match="trace: expected one of this model, with"):
            check(trace, model)


WINDOW = replace(GQA, model_type="qwen3", sliding_window=2)
SAME = {
    "types of layers": (WINDOW, {"layer_types": ("sliding_attention",) * 2}),
    "no windows": (GQA, {"model_type": "qwen3", "layer_types": ("full_attention",) * 2}),
    "a theta for each layer": (GQA, {"layer_rope_theta": (GQA.rope_theta,) * 2}),
    "no scaling to share": (GQA, {"sliding_rope_scaling": False}),
    "the usual scale": (GQA, {"attention_multiplier": GQA.attention_scale}),
    "a family with the same block": (GQA, {"model_type": "mistral"}),
}


@pytest.mark.parametrize("case", SAME)
def test_a_trace_of_a_config_that_means_the_same(case):
    """As a GGUF file and a config.json of one model may say it."""
    config, change = SAME[case]
    other = replace(config, **change)
    weights = random_weights(config, 0, np.float32)
    trace = record(model_of(config, weights), np.array([[3, 1, 4, 1]]))
    report = check(trace, model_of(other, weights), explain=False)
    assert {result.verdict for result in report.results} == {"PASS"}
