"""Roundings that engines make on purpose, made in naive code: each has its engine's name."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import RoundingProfile, check, sites
from llama_layers.verify.build import operation_of
from llama_layers.verify.profiles import PROFILES, Rounding
from llama_layers.verify.validate import validated
from tests.support.mistakes import Mistake
from tests.support.ported import (
    BASE,
    COUNT,
    LAYER,
    attended,
    causal,
    narrow,
    normed,
    omega,
    run,
    silu,
    softmax,
    turned,
)

BFLOAT16 = ml_dtypes.bfloat16
SCALE = BASE.head_dim**-0.5
SDPA, EAGER = "transformers with sdpa", "transformers"


class Habit(NamedTuple):
    """What an engine does at a site."""

    engine: str
    role: str
    dtype: object
    computed: object
    """The array of the site, from those before it, in float32 numbers that `dtype` holds."""
    said: str
    inputs: object = lambda role, array: array
    """What becomes of the inputs of the site first."""


def norm(p):
    return narrow(normed(p["x"], 1, BASE.rms_norm_eps)) * p.weight("input_layernorm")


def rope(p):
    a, b = np.split(p.heads("self_attn.q_proj"), 2, axis=-1)
    phases = np.outer(p.positions, omega(BASE)).astype(np.float32)[:, None]
    cos, sin = narrow(np.cos(phases)), narrow(np.sin(phases))
    y = [narrow(a * cos) - narrow(b * sin), narrow(b * cos) + narrow(a * sin)]
    return np.concatenate(y, axis=-1)


def far_rope(p):
    """Phases in float32, and all else in float64."""
    phases = p.positions.astype(np.float32)[:, None] * omega(BASE).astype(np.float32)
    return turned(p.heads("self_attn.q_proj"), phases.astype(np.float64))


def attention(p, weights=softmax, scale=None, rounded=lambda array: array):
    q, k, v = (rounded(p.heads(f"self_attn.{n}")) for n in ("q_rope", "k_rope", "v_proj"))
    return attended(q, k, v, causal(COUNT), scale, weights=weights)


def sdpa(p):
    return attention(p, lambda scores: narrow(softmax(scores)))


def eager(p):
    """Products, what they are scaled to, and probabilities: each is an array of its own."""
    return attention(p, lambda s: narrow(softmax(narrow(narrow(s) * np.float32(SCALE)))), 1.0)


def norm_in_float32(p):
    return normed(p["x"], 1, BASE.rms_norm_eps) * p.weight("input_layernorm")


def rope_in_float32(p):
    """The table in float32, and products in float64."""
    a, b = np.split(p.heads("self_attn.q_proj").astype(np.float64), 2, axis=-1)
    phases = np.outer(p.positions, omega(BASE))[:, None]
    cos, sin = (f(phases).astype(np.float32) for f in (np.cos, np.sin))
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def softmax_in_float32(p):
    p.arrays = {name: array.astype(np.float64) for name, array in p.arrays.items()}
    return attention(p, lambda scores: softmax(scores.astype(np.float32)).astype(np.float64))


def gate(p):
    return narrow(silu(p["mlp.gate_proj"])) * p["mlp.up_proj"]


def stepwise_gate(p):
    """The result of each operation is rounded, those within the sigmoid too."""
    g = p["mlp.gate_proj"]
    sigmoid = narrow(1 / narrow(1 + narrow(np.exp(-g))))
    return narrow(g * sigmoid) * p["mlp.up_proj"]


def cached(p):
    return attention(p, rounded=lambda array: narrow(array, np.float16))


def flushed(p):
    y = silu(p["mlp.gate_proj"]) * p["mlp.up_proj"]
    return np.where(abs(y) < 2.0**-126, 0, y)


def large_queries(role, array):
    return array * np.float32(8) if role.endswith("q_rope") else array


def tiny_gate(role, array):
    return array * np.float32(2.0**-125) if role.endswith("gate_proj") else array


HABITS = {
    "norm": Habit(
        SDPA, "input_layernorm", BFLOAT16, norm, "the normalised row to bfloat16 before the weight"
    ),
    "rope": Habit(
        SDPA, "self_attn.q_rope", BFLOAT16, rope,
        "phases to float32, cosines and sines to bfloat16, each product to bfloat16",
    ),
    "phases": Habit(
        "float32 phases", "self_attn.q_rope", np.float32, far_rope, "phases to float32"
    ),
    "sdpa": Habit(SDPA, "self_attn.attention", BFLOAT16, sdpa, "probabilities to bfloat16"),
    "eager": Habit(
        EAGER, "self_attn.attention", BFLOAT16, eager,
        "scores to bfloat16, probabilities to bfloat16", large_queries,
    ),
    "norm in float32": Habit(
        SDPA, "input_layernorm", np.float64, norm_in_float32, "its input and each step to float32"
    ),
    "RoPE in float32": Habit(
        SDPA, "self_attn.q_rope", np.float64, rope_in_float32,
        "phases to float32, its input and each step to float32",
    ),
    "softmax in float32": Habit(
        EAGER, "self_attn.attention", np.float64, softmax_in_float32, "the softmax to float32"
    ),
    "gate": Habit(SDPA, "mlp.act", BFLOAT16, gate, "silu(gate) to bfloat16"),
    "steps": Habit(
        "XLA", "mlp.act", BFLOAT16, stepwise_gate,
        "each step of the sigmoid to bfloat16, silu(gate) to bfloat16, subnormal numbers to zero",
    ),
    "cache": Habit(
        "llama.cpp", "self_attn.attention", np.float32, cached,
        "queries, keys and values to float16",
    ),
    "flushed": Habit(
        "XLA", "mlp.act", np.float32, flushed,
        "subnormal numbers to zero", tiny_gate,
    ),
}  # fmt: skip


def traced(habit):
    """A site and what it is computed from, as the engine has them."""
    sources = {}

    def computed(p):
        port = {name: habit.inputs(name, array) for name, array in p.arrays.items()}
        sources.update({name: array.astype(habit.dtype) for name, array in port.items()})
        p.arrays = {name: array.astype(np.float32) for name, array in sources.items()}
        return habit.computed(p)

    first = 90000 if habit.computed is far_rope else 0
    trace, model = run(Mistake("none", habit.role, computed, first=first))
    site = f"model.layers.{LAYER}.{habit.role}"
    arrays = sources | {site: trace.arrays[site].astype(habit.dtype)}
    return replace(trace, arrays=arrays), model, site


def found(trace, model, site, *, explain=False, **options):
    report = check(trace, model, explain=explain, **options)
    (result,) = (r for r in report.results if r.site.name == site)
    return result


@pytest.mark.parametrize("kind", HABITS)
def test_named(kind):
    habit = HABITS[kind]
    result = found(*traced(habit), explain=True)
    assert result.judgement.verdict == "FAIL"  # without the engine's roundings
    assert (result.verdict, result.explanations) == ("WARN", ())
    assert result.note == f"rounds as {habit.engine} does: {habit.said}"


@pytest.mark.parametrize("kind", HABITS)
def test_allowed_where_the_engine_is_named(kind):
    habit = HABITS[kind]
    trace, model, site = traced(habit)
    result = found(trace, model, site, profile=habit.engine)
    assert (result.verdict, result.note) == ("PASS", "")
    assert check(trace, model, profile=habit.engine, explain=False).profile == habit.engine


@pytest.mark.parametrize("kind", HABITS)
def test_not_allowed_where_another_is_named(kind):
    other = {BFLOAT16: "llama.cpp", np.float64: "XLA"}.get(HABITS[kind].dtype, SDPA)
    if kind == "phases":  # transformers has them in float32, too
        other = "XLA"
    assert found(*traced(HABITS[kind]), profile=other).verdict == "FAIL"


def test_roundings_of_ones_own():
    trace, model, site = traced(HABITS["gate"])
    assert found(trace, model, site, profile=RoundingProfile("mine", silu=True)).verdict == "PASS"
    assert found(trace, model, site, profile=RoundingProfile("mine", scores=True)).verdict == "FAIL"


def test_sums_of_flash_attention():
    """Some float16 roundings too many, as llama.cpp's flash attention has them: if it says so."""
    trace, model, site = traced(HABITS["cache"])
    engine = "llama.cpp with flash attention"
    more = trace.arrays[site] * np.float32(1 + 2.0**-8)
    trace = replace(trace, arrays=trace.arrays | {site: more})
    assert found(trace, model, site).verdict == "FAIL"
    assert found(trace, model, site, profile="llama.cpp").verdict == "FAIL"
    assert found(trace, model, site, profile=engine).verdict == "PASS"
    said = found(replace(trace, metadata={"flash_attention": "yes"}), model, site)
    assert said.verdict == "WARN"
    assert said.note.startswith(f"rounds as {engine} does: queries, keys and values to float16, ")
    none = found(replace(trace, metadata={"flash_attention": "no"}), model, site)
    assert none.verdict == "FAIL"


def test_padding_is_nobodys_rounding():
    trace, model, site = traced(HABITS["sdpa"])
    keep = np.ones((2, COUNT), bool)
    keep[1, -4:] = False  # after the tokens, which see none of it
    array = trace.arrays[site].copy()
    array[~keep] = 7.0
    padded = replace(trace, arrays=trace.arrays | {site: array}, attention_mask=keep)
    assert found(padded, model, site).note.startswith(f"rounds as {SDPA} does: ")
    assert found(trace, model, site).verdict == "WARN"
    array[keep] *= 2
    assert found(padded, model, site).verdict == "FAIL"


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_profile_rounds_nothing_but_the_steps_of_an_operation(profile):
    """Profiles that agree in them are not tried twice."""
    trace, model, _ = traced(HABITS["gate"])
    recorded = validated(trace, model.config)
    for site in sites(model.config):
        for route in site.routes if site.layer in (LAYER, None) else ():
            if not set(route) <= trace.arrays.keys():
                continue
            operation = operation_of(site, route, recorded, model)
            here = (*operation.steps, "flushes", "excess_precision")
            same = RoundingProfile("same", **{name: getattr(profile, name) for name in here})
            assert same.rounds(operation.steps) == profile.rounds(operation.steps)
            bounds = (
                operation.bound(Rounding("bfloat16", "float32", each, "bfloat16"))
                for each in (profile, same)
            )
            for one, other in zip(*(vars(bound).values() for bound in bounds), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": 0}, "ranks: expected a positive integer, got 0"),
        ({"ranks": 2.5, "reduce": "bfloat16"}, "ranks: expected a positive integer, got 2.5"),
        ({"ranks": True}, "ranks: expected a positive integer, got True"),
        ({"ranks": 2, "reduce": "int8"}, "reduce: expected one of .*, got 'int8'"),
        ({"kv_cache": "fp8"}, "kv_cache: expected one of .*, got 'fp8'"),
        ({"block": 0}, "block: expected a positive integer, got 0"),
    ],
)
def test_a_profile_that_no_engine_has_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        RoundingProfile("mine", **fields)
