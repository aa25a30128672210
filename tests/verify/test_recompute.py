"""Sites without recorded inputs, recomputed since the last arrays that were recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_layers import forward
from llama_layers.verify import Trace, check, record, sites
from tests.support.mistakes import Mistake
from tests.support.ported import BASE, CONFIGS, LAYER, WEIGHTS, run, softmax
from tests.support.random_models import CONFIGS as ANY
from tests.support.random_models import model_of, random_weights

ROLES = [site.role for site in sites(BASE) if site.layer == LAYER and not site.optional]


def right(p):
    return p.right


def only(trace, *names):
    return replace(trace, arrays={name: trace.arrays[name] for name in names})


def verdicts(report):
    return {result.site.name: result.verdict for result in report.results}


def growing(p):
    """Wrong by another factor in each channel, which no norm undoes."""
    factors = np.linspace(1, 2, p.right[0, 0].size).reshape(p.right.shape[2:])
    return p.right * factors


@pytest.mark.parametrize("role", [*ROLES, "model.embed_tokens"])
def test_what_follows_from_an_error_is_not_counted(role):
    """A port computes all that comes after its mistake right, from what the mistake left."""
    mistake = Mistake("none", role.removesuffix("layer") if role == "layer" else role, growing)
    trace, model = run(mistake)
    found = verdicts(check(only(trace, mistake.site, "lm_head"), model, explain=False))
    itself = "FAIL" if role == "model.embed_tokens" else "DIFFERS"  # ids are recorded always
    assert found == {mistake.site: itself, "lm_head": "SEEN"}
    alone = check(only(trace, "lm_head"), model, explain=False)
    assert verdicts(alone) == {"lm_head": "DIFFERS"}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"padded": True}, {"first": 7}], ids=str)
def test_tokens_see_and_stand_where_they_do(config, options):
    trace, model = run(Mistake("none", "input_layernorm", right, config, **options))
    for name in ("model.layers.1.self_attn.attention", "model.layers.2", "lm_head"):
        assert verdicts(check(only(trace, name), model, explain=False)) == {name: "SEEN"}


def pairs(trace, role):
    """Scores or probabilities of the second layer, from its queries and keys, in float64."""
    at = "model.layers.1.self_attn."
    q, k = (trace.arrays[f"{at}{name}_rope"].astype(float) for name in "qk")
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[3])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    values = scores if role == "scores" else softmax(scores)
    return {f"{at}{role}": values.astype(np.float32)}


@pytest.mark.parametrize("role", ["scores", "probabilities"])
def test_pairs_of_tokens(role):
    """As transformers' attentions beside its hidden states."""
    trace, model = run(Mistake("none", "input_layernorm", right))
    states = only(trace, "model.layers.0", "model.layers.1").arrays
    found = pairs(trace, role)
    (name,) = found
    port = replace(trace, arrays=states | found)
    assert verdicts(check(port, model, explain=False))[name] == "SEEN"
    hidden = ~np.tri(found[name].shape[2], dtype=bool)
    for wrong, verdict in ((hidden, "SEEN"), (~hidden, "DIFFERS")):
        array = np.where(wrong, np.float32(0.25), found[name])
        report = check(replace(port, arrays=states | {name: array}), model)
        assert verdicts(report)[name] == verdict
        assert "No mistake that is known" not in str(report)


@pytest.mark.parametrize("name", ANY)
def test_pairs_of_any_config(name):
    """Also of padded sequences."""
    config = ANY[name]
    model = model_of(config, random_weights(config, 0, np.float32))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, 6))
    keep = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    for pair in ("scores", "probabilities"):
        trace = record(model, ids, attention_mask=keep, sites=["layer", pair])
        assert set(verdicts(check(trace, model, explain=False)).values()) == {"SEEN"}


@pytest.mark.parametrize("names", [["lm_head"], ["model.norm"], ["model.norm", "lm_head"]])
def test_the_last_token_alone(names):
    trace, model = run(Mistake("none", "input_layernorm", right))
    last = replace(trace, arrays={name: trace.arrays[name][:, -1:] for name in names})
    assert verdicts(check(last, model, explain=False))[names[0]] == "SEEN"
    first = replace(trace, arrays={name: trace.arrays[name][:, :1] for name in names})
    assert verdicts(check(first, model, explain=False))[names[0]] == "DIFFERS"


def test_the_last_token_beside_padding():
    trace, model = run(Mistake("none", "input_layernorm", right, padded=True))
    last = replace(trace, arrays={"lm_head": trace.arrays["lm_head"][:, -1:].copy()})
    assert verdicts(check(last, model, explain=False)) == {"lm_head": "SEEN"}
    last.arrays["lm_head"][1] += 1  # the row that starts with padding
    assert verdicts(check(last, model, explain=False)) == {"lm_head": "DIFFERS"}


@pytest.mark.parametrize("name", ["model.layers.0", "lm_head"])
def test_float64(name):
    """Not even our own run differs from the exact one, and still no port must match it."""
    weights = {n: array.astype(np.float64) for n, array in WEIGHTS["base"].items()}
    model = model_of(BASE, weights)
    trace = only(record(model, np.array([[3, 1, 4, 1, 5]])), name)
    signs = np.random.default_rng(0).choice([-1, 1], trace.arrays[name].shape)
    for size, verdict in ((0, "SEEN"), (2.0**-53, "SEEN"), (1e-9, "DIFFERS")):
        array = trace.arrays[name] * (1 + size * signs)
        assert verdicts(check(replace(trace, arrays={name: array}), model, explain=False)) == {
            name: verdict
        }


def test_float32_arrays_beside_weights_in_float64():
    wide = model_of(BASE, {n: array.astype(np.float64) for n, array in WEIGHTS["base"].items()})
    narrow = model_of(BASE, WEIGHTS["base"])
    trace = only(record(narrow, np.array([[3, 1, 4, 1, 5]])), "lm_head")
    assert verdicts(check(trace, wide, explain=False)) == {"lm_head": "SEEN"}


def test_what_rounding_grows_to_is_no_difference():
    """Sharp attention in each layer makes much of the last bits of what it compares."""
    sharp = {n: 30 * a if n.endswith("q_proj.weight") else a for n, a in WEIGHTS["base"].items()}
    model = model_of(BASE, sharp)
    rng = np.random.default_rng(3)
    ids = rng.integers(0, BASE.vocab_size, (2, 14))

    def last_bits(name, array):
        return array * (1 + 2.0**-23 * rng.choice([-1, 1], array.shape)).astype(np.float32)

    logits = forward(model, ids, tap=last_bits).logits
    assert logits.dtype == np.float32
    (result,) = check(Trace({"lm_head": logits}, ids), model).results
    assert result.difference > 60 * 2.0**-24
    assert result.verdict == "SEEN"
