"""What a diagnosis says of a failing site, and what it does not."""

from __future__ import annotations

import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, check, mistakes, sites
from llama_layers.verify.bound import Bound
from llama_layers.verify.build import operation_of
from llama_layers.verify.diagnose import diagnose
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.registry import Computed
from llama_layers.verify.mistakes.rounding import CUT_OFF, NEAREST, tf32
from llama_layers.verify.operations import Rope
from llama_layers.verify.profiles import PROFILES, Rounding
from llama_layers.verify.validate import validated
from tests.support.mistakes import MISTAKES, Mistake
from tests.support.ported import (
    BASE,
    COUNT,
    LAYER,
    WEIGHTS,
    attended,
    causal,
    narrow,
    normed,
    omega,
    run,
    told,
    turned,
)
from tests.support.random_models import model_of

NAME = f"model.layers.{LAYER}.self_attn"


def failing_site_of(mistake):
    """What `check` hands over for the site of a mistake."""
    trace, model = run(mistake)
    recorded = validated(trace, model.config)
    (site,) = (site for site in sites(model.config) if site.name == mistake.site)
    operation = operation_of(site, recorded.route(site), recorded, model)
    array = recorded.array(site.name)
    return FailingSite(site, operation, array, Rounding("float32", "float32"), recorded, model)


INTERLEAVED = next(m for m in MISTAKES if m.name == "RoPE layout interleaved")


def test_only_the_named_are_tried():
    failing = failing_site_of(INTERLEAVED)
    assert diagnose(failing, only=[]) == ()
    assert diagnose(failing, only=["another rope_theta"]) == ()
    (found,) = diagnose(failing, only=["RoPE layout interleaved", "RoPE not applied"])
    assert found.name == "RoPE layout interleaved"
    assert found.detail == (
        "The port seems to pair channels 2i and 2i + 1; it should pair i and i + D / 2, as this "
        "checkpoint does."
    )


def test_an_array_within_its_bound_needs_no_explanation():
    failing = failing_site_of(INTERLEAVED)
    exact = failing.bound(failing.formats).exact.astype(np.float32)
    assert diagnose(replace(failing, computed=exact)) == ()


def test_noise_is_not_explained():
    rng = np.random.default_rng(1)
    for role in ("input_layernorm", "self_attn.q_rope", "self_attn.attention", "mlp.act", ""):
        noisy = Mistake(
            "none", role, lambda p: p.right * (1 + 0.5 * rng.standard_normal(p.right.shape))
        )
        report = check(*run(noisy))
        assert report.first.site.name == noisy.site
        assert report.first.explanations == ()


@pytest.mark.parametrize("size", [0.003, 0.03, 0.3])
def test_small_noise_is_not_explained(size):
    """Of bfloat16, where bounds with every engine's roundings are wide."""
    rng = np.random.default_rng(3)
    name = f"{NAME}.attention"
    arrays = rounded_trace()
    arrays[name] = (size * rng.standard_normal(arrays[name].shape)).astype(ml_dtypes.bfloat16)
    report = check(Trace(arrays), model_of(BASE, WEIGHTS["base"]))
    assert report.first.site.name == name
    assert told(report) == []


def test_a_bound_that_holds_zero_explains_nothing(monkeypatch):
    failing = failing_site_of(INTERLEAVED)
    right = failing.bound(failing.formats).exact
    failing = replace(failing, computed=(0.01 * right).astype(np.float32))
    for size, names in ((0.5, ["vague"]), (2.0, [])):
        limit = size * 0.1 * np.abs(right)
        bound = Bound(0.1 * right, limit, limit)
        vague = mistakes.Mistake(
            "vague", Rope, lambda rope, at, y=bound: Computed(lambda how: y), "The port is vague."
        )
        monkeypatch.setattr(sys.modules[diagnose.__module__], "MISTAKES", (vague,))
        near = replace(failing, computed=(0.08 * right).astype(np.float32))
        assert [found.name for found in diagnose(near)] == names


def test_weights_err_as_those_of_attention():
    """The limit of another softmax is near that of attention, for the same softmax."""
    mistake = Mistake("none", "self_attn.attention", lambda p: p.right)
    operation = failing_site_of(mistake).operation

    def same(heads):
        scores = heads.scores().where(heads.allowed, -np.inf)
        weights = (scores - scores.max()).exp()
        return heads.weigh(weights / weights.sum())

    for formats in (
        Rounding("float32", "float32"),
        Rounding("bfloat16", "float32", PROFILES["transformers"]),
        Rounding("float32", "float32", PROFILES["llama.cpp"]),
    ):
        ours, theirs = operation.evaluate(same, formats), operation.bound(formats)
        assert np.allclose(ours.exact, theirs.exact, rtol=1e-12, atol=1e-14)
        share = ours.limit / theirs.limit
        assert 0.5 <= share.min() <= share.max() <= 10


@pytest.mark.parametrize("window", [2, 4, 6])
def test_a_window_is_no_other_softmax(window):
    """In bfloat16, too, where many keys are seen with errors of many roundings."""
    arrays = rounded_trace()
    q, k, v = (
        arrays[f"{NAME}.{role}"].astype(np.float32).reshape(2, COUNT, -1, 8)
        for role in ("q_rope", "k_rope", "v_proj")
    )
    arrays[f"{NAME}.attention"] = attended(q, k, v, causal(COUNT, window)).astype(
        ml_dtypes.bfloat16
    )
    report = check(Trace(arrays), model_of(BASE, WEIGHTS["base"]))
    assert report.first.site.name == f"{NAME}.attention"
    assert told(report) == ["other tokens seen"]


def rounded_trace():
    """What attention reads and makes, in bfloat16."""
    trace, _ = run(Mistake("none", "self_attn.attention", lambda p: p.right))
    names = [f"{NAME}.{role}" for role in ("q_rope", "k_rope", "v_proj", "attention")]
    return {name: trace.arrays[name].astype(ml_dtypes.bfloat16) for name in names}


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (np.s_[:, :, :], "all over the array"),
        (np.s_[:, 5], "token 5 only"),
        (np.s_[1, 2, 7], "sequence 1, token 2, channel 7 only"),
    ],
)
def test_where_nan_begins(places, said):
    """Not in other arrays, which have it, too."""
    trace, model = run(INTERLEAVED)
    arrays = {name: np.array(array) for name, array in trace.arrays.items()}
    late = [name for name in arrays if name.startswith(f"model.layers.{LAYER}")]
    for name in late:
        arrays[name][places if arrays[name].ndim == 3 else places[:2]] = np.nan
    report = check(Trace(arrays, trace.input_ids), model)
    assert report.first.site.name == f"model.layers.{LAYER}.input_layernorm"
    assert told(report) == ["NaN or Inf begins here"]
    assert report.first.explanations[0].detail.startswith("NaN begins here: ")
    assert report.first.place.words == said


def test_where_inf_begins():
    trace, model = run(INTERLEAVED)
    arrays = {name: np.array(array) for name, array in trace.arrays.items()}
    arrays["model.norm"][0, 3, 1] = np.inf
    arrays["model.norm"][1, 3, 1] = np.nan
    results = check(Trace(arrays, trace.input_ids), model).results
    result = next(r for r in results if r.site.name == "model.norm")
    (found,) = result.explanations
    assert found.detail.startswith("NaN and Inf begin here: ")
    assert result.place.words == "token 3, channel 1 only"


def test_nan_begins_nowhere_that_gets_what_is_not_finite():
    trace, model = run(INTERLEAVED)
    x, y = "model.layers.0", "model.layers.1.attention_residual"
    arrays = {name: np.array(array) for name, array in trace.arrays.items()}
    arrays[x][0, 3, 5], arrays[y][0, 3, 5] = np.inf, np.nan
    results = {r.site.name: r for r in check(Trace(arrays, trace.input_ids), model).results}
    assert results[y].verdict == "FAIL"
    assert "NaN or Inf begins here" not in [e.name for e in results[y].explanations]


def test_a_scale_is_no_rounding():
    """Errors as large as those of bfloat16 sums, but all to one side."""
    rng = np.random.default_rng(2)
    scaled = Mistake(
        "none",
        "self_attn.q_proj",
        lambda p: p.right * (1 + rng.uniform(0.002, 0.01, p.right.shape)),
    )
    assert told(check(*run(scaled))) == []


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (np.s_[:, 8:], "At tokens 8..13"),
        (np.s_[:, 5], "At token 5"),
        (np.s_[1], "In sequence 1"),
        (np.s_[1, 8:], "At tokens 8..13 of sequence 1"),
        (np.s_[:, [2, 9]], "At 2 tokens, the first 2 and the last 9"),
    ],
)
def test_a_mistake_in_a_part_of_the_tokens(places, said):
    def wrong(p):
        y = p.right.copy()
        y[places] = INTERLEAVED.wrong(p).reshape(y.shape)[places]
        return y

    report = check(*run(INTERLEAVED._replace(wrong=wrong)))
    assert told(report) == ["RoPE layout interleaved"]
    assert report.first.explanations[0].detail.startswith(f"{said} only: the port seems to ")


def test_a_mistake_beside_an_engines_own_roundings():
    """As transformers has it: table, products and sum in bfloat16; but with the other sign."""
    trace, model = run(INTERLEAVED)
    x = trace.arrays[f"{NAME}.q_proj"].astype(ml_dtypes.bfloat16).astype(np.float32)
    a, b = np.split(x.reshape(2, COUNT, 4, 8), 2, axis=-1)
    phases = np.outer(np.arange(COUNT), omega(BASE)).astype(np.float32)[:, None]
    cos, sin = narrow(np.cos(phases)), -narrow(np.sin(phases))
    y = [narrow(a * cos) - narrow(b * sin), narrow(b * cos) + narrow(a * sin)]
    arrays = {f"{NAME}.q_proj": x, f"{NAME}.q_rope": np.concatenate(y, axis=-1)}
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    for profile in (None, "transformers"):
        report = check(Trace(arrays, trace.input_ids), model, profile=profile)
        assert told(report) == ["RoPE rotated the other way"]
    assert told(check(Trace(arrays, trace.input_ids), model, profile="float32 phases")) == []


def test_positions_are_told():
    stale = next(m for m in MISTAKES if m.name == "RoPE at other positions")
    (found,) = check(*run(stale)).first.explanations
    assert found.detail == (
        "The port seems to rotate tokens 9..13 at positions 0..4 instead of positions 9..13."
    )


def test_runs_of_positions_go_up_by_one():
    mistake = next(m for m in MISTAKES if m.name == "RoPE at other positions")
    places = np.concatenate([[0, 1, 3, 5], np.arange(8, 8 + COUNT - 4)])
    theirs = mistake._replace(
        wrong=lambda p: turned(p.heads("self_attn.q_proj"), np.outer(places, omega(p.config)))
    )
    (explanation,) = check(*run(theirs)).first.explanations
    assert (
        "token 2 at position 3 instead of position 2, token 3 at position 5 instead of position 3, "
        "tokens 4..13 at positions 8..17 instead of positions 4..13" in explanation.detail
    )


def test_another_layer_is_told():
    layer = next(m for m in MISTAKES if m.name == "another layer's weights")
    (found,) = check(*run(layer)).first.explanations
    assert found.detail == (
        "The port seems to have the weights of layer 2; it should have those of layer 1."
    )


@pytest.mark.parametrize("said", ["keys", "values", "keys and values"])
def test_arrays_with_tiled_heads_are_told(said):
    repeated, tiled = [0, 0, 1, 1], [0, 1, 0, 1]
    trace, model = run(Mistake("none", "input_layernorm", lambda p: p.right))
    arrays = dict(trace.arrays)
    q, k = arrays[f"{NAME}.q_rope"].astype(np.float64), arrays[f"{NAME}.k_rope"]
    v = arrays[f"{NAME}.v_proj"].reshape(k.shape)
    k, v = (
        x[:, :, tiled if word in said else repeated] for x, word in ((k, "keys"), (v, "values"))
    )
    scores = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(8)
    e = np.where(causal(COUNT), np.exp(scores), 0.0)
    y = np.einsum("bhst,bthd->bshd", e / e.sum(axis=-1, keepdims=True), v)
    arrays[f"{NAME}.attention"] = y.astype(np.float32)
    report = check(Trace(arrays, trace.input_ids), model)
    assert told(report) == ["value heads tiled" if said == "values" else "key heads tiled"]
    (found,) = report.first.explanations
    assert found.detail == (
        f"The port seems to give query head h the {said} of head h mod kv_heads; it should give "
        "it those of head h // (heads / kv_heads): repeat, do not tile."
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_other_ids_are_told(dtype):
    ids = np.random.default_rng(5).integers(0, BASE.vocab_size, (2, COUNT))
    places, rows = [(0, 3), (1, 0), (1, 1), (1, 9)], [17, 18, 96, 0]
    weights = {name: array.copy() for name, array in WEIGHTS["base"].items()}
    table = weights["model.embed_tokens.weight"]
    table[5, :4] = table[17, :4]  # a row that begins like another
    array = table[ids].astype(dtype)
    for place, row in zip(places, rows, strict=True):
        array[place] = table[row]
    model, name = model_of(BASE, weights), "model.embed_tokens"
    report = check(Trace({name: array}, ids), model)
    assert told(report) == ["other token ids"]
    said = [ids[place] for place in places]
    assert report.first.explanations[0].detail == (
        f"The token at (0, 3): the array is row 17, input_ids says {said[0]}; at (1, 0): the array "
        f"is row 18, input_ids says {said[1]}; at (1, 1): the array is row 96, input_ids says "
        f"{said[2]}; and 1 more."
    )
    array[1, 9] = 7.0
    assert told(check(Trace({name: array}, ids), model)) == []


def test_zeros_are_told():
    zeros = next(m for m in MISTAKES if m.name == "zeros")
    first = check(*run(zeros)).first
    assert [e.detail for e in first.explanations] == [
        "The port has zeros that should be other numbers."
    ]
    assert first.place.words == "output channel 5 only"


def test_zeros_at_another_site_explain_nothing():
    """A block that is not added is not another one added, of which all numbers are zero."""
    trace, model = run(Mistake("block not added", "", lambda p: p["attention_residual"]))
    arrays = dict(trace.arrays)
    arrays[f"{NAME}.o_proj"] = np.zeros_like(arrays[f"{NAME}.o_proj"])
    report = check(replace(trace, arrays=arrays), model)
    (last,) = (r for r in report.failures if r.site.role == "layer")
    assert {cause.name for cause in last.explanations} == {"block not added"}


def test_tf32():
    """10 bits after the point, ties away from zero, or cut off; no number out of range."""
    below_half = 1 + 2.0**-11 - 2.0**-23
    x = [1 + 2.0**-11, below_half, 1 + 2.0**-12, -1 - 3 * 2.0**-11, np.inf, np.nan, 0.0]
    x = np.array(x, np.float32)
    nearest, cut_off = tf32(x, NEAREST), tf32(x, CUT_OFF)
    assert nearest.tolist()[:5] == [1 + 2.0**-10, 1.0, 1.0, -1 - 2 * 2.0**-10, np.inf]
    assert cut_off.tolist()[:5] == [1.0, 1.0, 1.0, -1 - 2.0**-10, np.inf]
    assert np.isnan(nearest[5])
    assert np.isnan(cut_off[5])
    assert narrow(x)[0] == 1.0


def test_the_eps_that_fits_best_is_told_alone():
    """Within the bound lie smaller ones, too, which leave errors many times as large."""
    mistake = next(m for m in MISTAKES if m.name == "another eps")
    theirs = mistake._replace(wrong=lambda p: normed(p["x"], p.weight("input_layernorm"), 1e-6))
    (explanation,) = check(*run(theirs)).first.explanations
    assert explanation.detail == "The port seems to add an eps of 1e-06; it should add 0.0001."


def test_what_could_be_mistaken_is_near_or_the_embedding():
    trace, model = run(INTERLEAVED)
    recorded = validated(trace, model.config)
    site = next(s for s in sites(model.config) if s.name == "model.layers.2.input_layernorm")
    operation = operation_of(site, recorded.route(site), recorded, model)
    array, formats = recorded.array(site.name), Rounding("float32", "float32")
    at = FailingSite(site, operation, array, formats, recorded, model)
    names = [name for name, _ in at.streams(array.shape)]
    assert {name.split(".")[2] for name in names if "layers" in name} == {"1", "2"}
    assert names[-1] == "model.embed_tokens"


def test_a_batch_of_one():
    mistake = next(m for m in MISTAKES if m.name == "RoPE not applied")
    trace, model = run(mistake)
    one = {name: array[:1] for name, array in trace.arrays.items()}
    assert told(check(Trace(one, trace.input_ids[:1]), model)) == ["RoPE not applied"]
