"""Options that allow what is meant: each does what its sentence says, and no mistake gets one."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import apply_rope, attention, forward, rope_table
from llama_layers.testing import assert_matches_reference
from llama_layers.verify import Trace, check, record
from llama_layers.verify.allowed_roundings import allowing
from llama_layers.verify.profiles import CONTRACT, PROFILES
from tests.support.random_models import GQA, model_of, random_weights

MODEL = model_of(GQA, random_weights(GQA, 0, np.float32))
IDS = np.random.default_rng(0).integers(0, GQA.vocab_size, (2, 7))


def model_in(dtype):
    """The same model with weights rounded by ml_dtypes."""
    weights = random_weights(GQA, 0, np.float32)
    return model_of(GQA, {name: array.astype(dtype) for name, array in weights.items()})


def run_in(dtype):
    """A run that rounds every array to a format, and is written as float32; and its model."""
    rounded = model_in(dtype)
    weights = random_weights(GQA, 0, np.float32)
    wide = {name: array.astype(dtype).astype(np.float32) for name, array in weights.items()}
    arrays = {}

    def write(name, array):
        arrays[name] = array.astype(dtype).astype(np.float32)
        return arrays[name]

    forward(model_of(GQA, wide), IDS, tap=dict.fromkeys(record(MODEL, IDS).arrays, write))
    return rounded, Trace(arrays, IDS)


def with_arrays(trace, **arrays):
    return replace(trace, arrays={**trace.arrays, **arrays})


def interleaved(trace, *roles):
    """Pairs of half a head apart put next to each other."""

    def put(array):
        halves = array.reshape(*array.shape[:2], -1, 2, GQA.head_dim // 2)
        return np.swapaxes(halves, -1, -2).reshape(array.shape)

    arrays = {n: put(a) if n.endswith(roles) else a for n, a in trace.arrays.items()}
    return replace(trace, arrays=arrays)


def with_cache(trace, model, dtype=np.float16):
    """Attention over keys and values that a cache has rounded, and what follows from it."""
    arrays = dict(trace.arrays)
    for layer in range(GQA.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn."
        q, k = (arrays[f"{name}{role}"] for role in ("q_rope", "k_rope"))
        v = arrays[f"{name}v_proj"].reshape(k.shape)
        k, v = (array.astype(dtype).astype(np.float32) for array in (k, v))
        mask = np.tri(q.shape[1], dtype=bool)
        heads = attention(q, k, v, mask=mask)
        arrays[f"{name}attention"] = heads
        weight = model.weights.layers[layer].self_attn.o_proj
        arrays[f"{name}o_proj"] = heads.reshape(*heads.shape[:2], -1) @ weight.T
    return replace(trace, arrays=arrays)


def options(report):
    return [remedy.option for remedy in report.remedies]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_arrays_written_as_float32(dtype):
    narrow = np.dtype(dtype).name
    model, dump = run_in(dtype)
    report = check(dump, MODEL)
    assert options(report) == [f"--dtype {narrow}"]
    assert f'{narrow}")) leaves no failing site.' in report.text(width=1000)
    assert check(dump, model, dtype=narrow).verdict == "PASS"
    # The weights of the model are known to be rounded: then metadata does it, too.
    same = check(dump, model).remedies[0]
    assert (same.option, same.instead.split(" in ")[0]) == (
        f"--dtype {narrow}",
        f'"dtype": "{narrow}"',
    )
    assert check(replace(dump, metadata={"dtype": narrow}), model).verdict == "PASS"


def test_float64_with_sums_in_float32():
    trace, rng = record(MODEL, IDS), np.random.default_rng(1)
    arrays = {name: array.astype(np.float64) for name, array in trace.arrays.items()}
    for array in (arrays[name] for name in arrays if "mlp" in name):
        array *= 1 + 1e-12 * rng.standard_normal(array.shape)
    double = Trace(arrays, trace.input_ids)
    report = check(double, MODEL)
    assert report.verdict == "FAIL"
    assert options(report) == ["--accumulate float32"]
    assert report.remedies[0].instead == '"accumulate": "float32" in the trace\'s metadata'
    assert check(double, MODEL, accumulate="float32").agrees


def test_what_is_left_is_counted():
    """A mistake besides."""
    model, dump = run_in(ml_dtypes.bfloat16)
    name = "model.layers.1.mlp.up_proj"
    report = check(with_arrays(dump, **{name: 2 * dump.arrays[name]}), model)
    assert options(report) == ["--dtype bfloat16"]
    left = check(
        with_arrays(dump, **{name: 2 * dump.arrays[name]}), model, dtype="bfloat16"
    ).failures
    assert report.remedies[0].left == len(left) == 2  # and mlp.act
    assert report.remedies[0].failing == len(report.failures)
    assert f"leaves 2 of {len(report.failures)} failing sites." in report.text(width=1000)


def test_no_option_makes_others_fail_instead(monkeypatch):
    """Where there is time for a few sites only, they tell nothing of how many would fail."""
    module = sys.modules["llama_layers.verify.remedies"]
    monkeypatch.setattr(module, "_ALL", 0)
    monkeypatch.setattr(module, "_TIME", 3.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=count().__next__))
    trace = record(MODEL, IDS)
    cos, sin = rope_table(np.arange(IDS.shape[1]), GQA, like=np.zeros(1, np.float32))
    turned = {}
    for name in (n for n in trace.arrays if n.endswith("_rope")):
        x = trace.arrays[name.replace("rope", "proj")].reshape(trace.arrays[name].shape)
        turned[name] = apply_rope(x, cos, sin, layout="interleaved")
    report = check(with_arrays(trace, **turned), MODEL)
    assert report.first.explanations[0].name == "RoPE layout interleaved"
    assert options(report) == []


def test_pairs_next_to_each_other():
    trace = interleaved(record(MODEL, IDS), "q_proj", "k_proj", "q_rope", "k_rope")
    report = check(trace, MODEL)
    assert options(report) == ["--rope-layout interleaved"]
    assert not report.remedies[0].left
    assert check(trace, MODEL, rope_layout="interleaved").verdict == "PASS"
    declared = replace(trace, metadata={"rope_layout": "interleaved"})
    assert check(declared, MODEL, rope_layout="half").verdict == "FAIL"


@pytest.mark.parametrize(
    ("dtype", "option"),
    # Queries and probabilities in float16 besides are a habit of llama.cpp's.
    [("float16", '--profile "llama.cpp"'), ("bfloat16", "--allow cache=bfloat16")],
)
def test_a_cache(dtype, option):
    trace = with_cache(record(MODEL, IDS), MODEL, np.dtype(dtype))
    kept = ("_rope", "v_proj", "self_attn.attention", "o_proj")
    layer = {n: a for n, a in trace.arrays.items() if n.startswith("model.layers.0.")}
    trace = replace(trace, arrays={n: a for n, a in layer.items() if n.endswith(kept)})
    report = check(trace, MODEL)
    assert report.verdict == ("WARN" if dtype == "float16" else "FAIL")
    assert options(report) == [option]
    allowed = check(trace, MODEL, allow=f"cache={dtype}")
    assert {r.verdict for r in allowed.results if r.site.role == "self_attn.attention"} == {"PASS"}
    assert len(allowed.failures) == report.remedies[0].left
    assert f"with the roundings of cache={dtype}" in allowed.text(width=1000)


def test_a_cache_that_the_first_tokens_do_not_read():
    """A first chunk is often computed from keys and values that are not in the cache yet."""
    trace = record(MODEL, IDS)
    rounded = with_cache(trace, MODEL)
    name = "model.layers.0.self_attn.attention"
    mixed = np.concatenate([trace.arrays[name][:, :4], rounded.arrays[name][:, 4:]], axis=1)
    both = with_arrays(trace, **{name: mixed})
    found = {r.site.name: r for r in check(both, MODEL, allow="cache=float16").results}
    assert found[name].verdict == "PASS"
    wrong = with_arrays(trace, **{name: 1.0001 * mixed})
    found = {r.site.name: r for r in check(wrong, MODEL, allow="cache=float16").results}
    assert found[name].verdict == "FAIL"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: interleaved(t, "q_rope", "k_rope"),  # and not the projections
        lambda t: with_arrays(t, lm_head=t.arrays["lm_head"] + np.float32(0.01)),
        lambda t: with_arrays(
            t,
            **{
                "model.layers.0.self_attn.attention": t.arrays["model.layers.1.self_attn.attention"]
            },
        ),
        lambda t: with_arrays(t, **{"model.norm": np.float32(1.01) * t.arrays["model.norm"]}),
    ],
)
def test_a_mistake_has_none(change):
    assert check(change(record(MODEL, IDS)), MODEL).remedies == ()


def test_two_choices_at_once():
    trace = with_cache(record(MODEL, IDS), MODEL, ml_dtypes.bfloat16)
    layer = {n: a for n, a in trace.arrays.items() if n.startswith("model.layers.0.self_attn")}
    names = ("q_proj", "k_proj", "q_rope", "k_rope")
    before = {"model.layers.0.input_layernorm": trace.arrays["model.layers.0.input_layernorm"]}
    both = interleaved(replace(trace, arrays=layer | before), *names)
    (remedy,) = check(both, MODEL).remedies
    assert remedy.option == "--rope-layout interleaved --allow cache=bfloat16"
    assert not remedy.left
    report = check(both, MODEL, rope_layout="interleaved", allow="cache=bfloat16")
    assert report.verdict == "PASS"
    assert_matches_reference(both, MODEL, rope_layout="interleaved", allow="cache=bfloat16")
    with pytest.raises(AssertionError, match="If that is meant: --allow cache=bfloat16"):
        assert_matches_reference(both, MODEL, rope_layout="interleaved")


def test_none_are_tried_unasked():
    trace = interleaved(record(MODEL, IDS), "q_proj", "k_proj", "q_rope", "k_rope")
    assert check(trace, MODEL, explain=False).remedies == ()


def test_from_outputs_of_layers_alone():
    """Sites without a bound are recomputed with the other dtype, too."""
    _, trace = run_in(ml_dtypes.bfloat16)
    names = ["model.layers.0", "model.layers.1", "model.norm"]
    dump = replace(trace, arrays={name: trace.arrays[name] for name in names})
    report = check(dump, MODEL)
    assert report.verdict == "FAIL"
    assert options(report) == ["--dtype bfloat16"]


def test_a_profile_that_leaves_no_warning():
    """An engine's roundings, made by hand: silu(gate) is rounded before it multiplies."""
    model, trace = run_in(ml_dtypes.bfloat16)
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in trace.arrays.items()}
    for layer in range(GQA.num_hidden_layers):
        name = f"model.layers.{layer}.mlp."
        gate, up = (np.asarray(arrays[f"{name}{x}_proj"], np.float32) for x in ("gate", "up"))
        silu = (gate / (1 + np.exp(-gate))).astype(ml_dtypes.bfloat16)
        arrays[f"{name}act"] = (np.asarray(silu, np.float32) * up).astype(ml_dtypes.bfloat16)
    arrays = {n: a for n, a in arrays.items() if n.endswith(("gate_proj", "up_proj", "act"))}
    report = check(replace(trace, arrays=arrays), model)
    assert report.verdict == "WARN"
    (remedy,) = report.remedies
    assert "leaves no warning." in report.text(width=1000)
    profile = re.fullmatch(r'--profile "(.+)"', remedy.option)[1]
    assert check(replace(trace, arrays=arrays), model, profile=profile).verdict == "PASS"


def test_roundings_that_are_allowed():
    found = allowing(CONTRACT, "cache=float16, scores,probabilities=bfloat16, exp_ulps=8,block=4")
    assert (found.cache, found.scores, found.probabilities) == ("float16", True, "bfloat16")
    assert (found.exp_ulps, found.block, found.flushes) == (8.0, 4, False)
    assert found.name == "cache=float16, scores, probabilities=bfloat16, exp_ulps=8.0, block=4"
    theirs = allowing(PROFILES["llama.cpp"], "flushes")
    assert (theirs.name, theirs.kv_cache, theirs.flushes) == ("llama.cpp, flushes", "float16", True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cash=float16", "allow: expected roundings such as 'cache=float16,scores', got 'cash="),
        ("", "allow: expected roundings such as"),
        ("cache", "allow: expected a format, such as cache=float16, got 'cache'"),
        ("scores=half", "allow: expected scores, or one such as scores=bfloat16, got"),
        ("flushes=1", "allow: expected flushes, got 'flushes=1'"),
        ("block=many", "allow: expected a number, such as block=2, got"),
        ("name=x", "allow: expected roundings such as"),
        ("scores,scores=float16", "allow: expected each rounding once, got 'scores,scores"),
    ],
)
def test_roundings_that_are_unknown(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check(record(MODEL, IDS), MODEL, allow=text)


def test_layouts_that_are_unknown():
    with pytest.raises(ValueError, match="rope_layout: expected 'half' or 'interleaved', got 'x'"):
        check(record(MODEL, IDS), MODEL, rope_layout="x")
