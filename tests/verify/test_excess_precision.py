"""Engines that keep more digits than they write out, and runs for which that is no excuse."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import forward
from llama_layers.verify import Trace, check, record
from llama_layers.verify.profiles import CONTRACT, PROFILES, Rounding
from tests.support.random_models import GQA, model_of, random_weights

BFLOAT16 = ml_dtypes.bfloat16
EXCESS = "XLA with excess precision"
CONFIG = replace(
    GQA, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16, vocab_size=64
)
IDS = np.random.default_rng(1).integers(0, 64, (1, 12))


def weights_in(dtype):
    weights = random_weights(CONFIG, 0, np.float32)
    return {name: array.astype(BFLOAT16).astype(dtype) for name, array in weights.items()}


@pytest.fixture(scope="module")
def model():
    return model_of(CONFIG, weights_in(BFLOAT16))


@pytest.fixture(scope="module")
def trace():
    """Nothing is rounded but what is written: the engine goes on in float32."""
    arrays = {}

    def write(name, array):
        arrays[name] = array.astype(BFLOAT16)
        return array

    forward(model_of(CONFIG, weights_in(np.float32)), IDS, tap=write)
    return Trace(arrays, IDS)


def named(report):
    notes = (r.note for r in report.results if r.verdict == "WARN")
    assert all(r.place is None for r in report.results if r.verdict == "WARN")
    return {note.removeprefix("rounds as ").partition(" does: ")[0] for note in notes}


def test_named_and_allowed(model, trace):
    report = check(trace, model)
    assert report.agrees, report.first
    assert EXCESS in named(report)
    notes = {r.site.name: r.note for r in report.results}
    assert notes["model.layers.1.mlp.down_proj"] == (
        "rounds as XLA with excess precision does: subnormal numbers to zero, "
        "inputs only where they are written out"
    )
    assert check(trace, model, profile=EXCESS).verdict == "PASS"
    assert check(trace, model, profile="XLA", explain=False).verdict == "FAIL"


def test_stated_formats(model, trace):
    """Dumped as float32 by an engine in bfloat16; and float32 logits of bfloat16 activations."""
    dumped = {name: array.astype(np.float32) for name, array in trace.arrays.items()}
    report = check(Trace(dumped, IDS), model, dtype="bfloat16")
    assert report.agrees, report.first
    assert not check(Trace(dumped, IDS), model, explain=False).agrees
    name = "lm_head"
    wide = {n: a for n, a in trace.arrays.items() if n != name}
    exact = forward(model_of(CONFIG, weights_in(np.float32)), IDS).logits
    report = check(Trace(wide | {name: exact}, IDS), model)
    (logits,) = (r for r in report.results if r.site.name == name)
    assert (logits.dtype, logits.verdict) == ("float32", "WARN")
    assert logits.note.startswith(f"rounds as {EXCESS} does: ")


@pytest.mark.parametrize("profile", [None, EXCESS])
def test_mistakes_fail(model, trace, profile):
    layer = "model.layers.1"
    arrays = trace.arrays
    wrong = {
        f"{layer}.self_attn.q_rope": arrays[f"{layer}.self_attn.q_rope"][:, ::-1],
        f"{layer}.mlp.act": arrays[f"{layer}.mlp.act"][..., ::-1],
        f"{layer}.mlp.down_proj": arrays[f"{layer}.mlp.down_proj"] * BFLOAT16(1.25),
        f"{layer}.self_attn.attention": arrays[f"{layer}.self_attn.attention"][:, :, ::-1],
        f"{layer}.input_layernorm": arrays[f"{layer}.input_layernorm"] * BFLOAT16(1.0625),
        layer: arrays[f"{layer}.attention_residual"],
    }
    for site, array in wrong.items():
        report = check(Trace(arrays | {site: array}, IDS), model, profile=profile, explain=False)
        assert report.first.site.name == site


@pytest.mark.parametrize("profile", [None, EXCESS])
def test_no_excuse_where_sums_have_no_more_digits(profile):
    """Inputs off by a part of bfloat16's last digit, in float32 arrays."""
    model = model_of(CONFIG, weights_in(np.float32))
    trace = record(model, IDS)
    name = "model.layers.0.mlp.act"
    moved = trace.arrays | {name: trace.arrays[name] * np.float32(1 + 2.0**-12)}
    report = check(replace(trace, arrays=moved), model, profile=profile, explain=False)
    assert {r.site.role for r in report.results if r.verdict == "FAIL"} == {
        "mlp.act",
        "mlp.down_proj",
    }


@pytest.mark.parametrize("narrow", [BFLOAT16, np.float16])
def test_no_cache_is_an_excuse_for_float64(narrow):
    """Keys and values rounded on the way, in an engine that claims float64."""
    model = model_of(CONFIG, weights_in(np.float64))
    trace = record(model, IDS)
    read = {}

    def rounded(name, array):
        if name.endswith(("q_rope", "k_rope", "v_proj")):
            return array.astype(narrow).astype(np.float64)
        read[name] = array
        return array

    forward(model, IDS, tap=rounded)
    site = "model.layers.0.self_attn.attention"
    report = check(replace(trace, arrays=trace.arrays | {site: read[site]}), model, explain=False)
    assert report.first.site.name == site


def tried(*formats, inputs=None):
    return {profile.name for profile in Rounding(*formats, inputs=inputs).profiles}


def test_profiles_that_formats_allow():
    assert EXCESS in tried("bfloat16", "float32", inputs="bfloat16")
    assert EXCESS in tried("float32", "float32", inputs="bfloat16")
    assert EXCESS not in tried("bfloat16", "float32")  # an embedding has no inputs
    assert EXCESS not in tried("bfloat16", "float32", inputs="float32")
    assert EXCESS not in tried("bfloat16", "bfloat16", inputs="bfloat16")
    assert EXCESS not in tried("float64", "float64", inputs="float64")
    assert "llama.cpp" in tried("float32", "float32", inputs="float32")
    assert "llama.cpp with flash attention" not in tried("float32", "float32", inputs="float32")
    assert "llama.cpp" not in tried("float64", "float64", inputs="float64")
    assert "llama.cpp" not in tried("float16", "float32", inputs="float16")
    assert {"float32 phases", "XLA"} <= tried("float64", "float64", inputs="float64")


@pytest.mark.parametrize(
    ("profile", "inputs", "expected"),
    [
        (PROFILES[EXCESS], "bfloat16", "bfloat16"),
        (PROFILES[EXCESS], "float32", None),
        (PROFILES[EXCESS], None, None),
        (CONTRACT, "bfloat16", None),
    ],
)
def test_inputs_of_which_more_is_known(profile, inputs, expected):
    assert Rounding("float32", "float32", profile, inputs).unrounded_inputs == expected
