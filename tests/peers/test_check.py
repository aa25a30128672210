"""No false alarm on SmolLM2, whatever library computes it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from llama_layers import Llama, LlamaConfig, LlamaWeights, forward, load
from llama_layers.arrays.transfer import from_numpy
from llama_layers.verify import Trace, check, record
from llama_layers.verify.recorders import record_transformers
from tests.support.random_models import model_of, random_weights

pytestmark = pytest.mark.peer

TEXT = (
    "The river rose in the night, and by the morning it had taken the bridge, the mill and the "
    "lower half of the garden. Nobody in the house had slept. They stood at the windows upstairs "
    "and counted: 2 boats, 17 sheep, 1 piano."
)
LIBRARIES = {"numpy": np, "array_api_strict": array_api_strict, "torch": torch, "jax": jnp}


@pytest.fixture(scope="module")
def models(smollm2):
    """SmolLM2 with the weights that an engine of a dtype computes with."""
    return {dtype: load(smollm2, dtype=dtype) for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="module")
def ids(models):
    return np.array([models["float32"].tokenizer.encode(TEXT)[:64]])


def first_layers(model, count=3):
    """A shorter model: compiling all 30 layers takes half a minute."""
    config = replace(model.config, num_hidden_layers=count)
    weights = LlamaWeights(
        model.weights.embed_tokens,
        model.weights.layers[:count],
        model.weights.norm,
        model.weights.lm_head,
    )
    return Llama(config, weights)


def assert_no_false_alarm(trace, model, **options):
    report = check(trace, model, **options)
    assert report.agrees, report.first
    assert not report.missing
    return report


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("numpy", "float32"),
        ("array_api_strict", "float32"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
        ("jax", "float32"),
        ("jax", "bfloat16"),
    ],
)
def test_our_own_pass(smollm2, models, ids, name, dtype):
    xp = LIBRARIES[name]
    model = load(smollm2, backend="numpy" if xp is np else xp, dtype=dtype)
    trace = record(model, from_numpy(ids, xp))
    assert trace.metadata["dtype"] == dtype
    report = assert_no_false_alarm(trace, models[dtype])
    assert report.verdict == "PASS"


def test_float64(smollm2, ids):
    model = load(smollm2, dtype="float64")
    assert assert_no_false_alarm(record(model, ids), model).verdict == "PASS"


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        ("bfloat16", {}),
        ("bfloat16", {"xla_allow_excess_precision": False}),
    ],
)
def test_compiled(smollm2, models, ids, dtype, options):
    """jax.jit fuses, reorders and flushes as it likes.

    Unless told not to, it also goes on with more digits than it writes out in bfloat16.
    """
    model = first_layers(load(smollm2, backend=jnp, dtype=dtype))

    @partial(jax.jit, compiler_options=options)
    def traced(ids: Any) -> dict[str, Any]:
        arrays = {}

        def keep(name: str, array: Any) -> Any:
            arrays[name] = array
            return array

        forward(model, ids, tap=keep)
        return arrays

    trace, weights = Trace(traced(jnp.asarray(ids)), ids), first_layers(models[dtype])
    report = assert_no_false_alarm(trace, weights)
    excess = "XLA with excess precision"
    if dtype == "bfloat16" and not options:
        assert any(r.note.startswith(f"rounds as {excess} does: ") for r in report.results)
    else:
        assert report.verdict == "PASS"
    assert assert_no_false_alarm(trace, weights, profile=excess).verdict == "PASS"


def plain_jax(config: LlamaConfig, tensors: dict[str, Any], ids: Any) -> dict[str, Any]:
    """A decoder as it is written in jax: norms, RoPE and softmax in float32, all else as it is."""
    arrays: dict[str, Any] = {}

    def wide(array: Any) -> Any:
        return array.astype(jnp.float32)

    def keep(name: str, array: Any) -> Any:
        arrays[name] = array
        return array

    def linear(name: str, x: Any) -> Any:
        return keep(name, x @ tensors[f"{name}.weight"].T)

    def norm(name: str, x: Any) -> Any:
        x = wide(x)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps)
        return keep(name, (x * wide(tensors[f"{name}.weight"])).astype(jnp.bfloat16))

    def rope(name: str, x: Any) -> Any:
        a, b = jnp.split(wide(x), 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return keep(name, turned.astype(jnp.bfloat16))

    count, width = ids.shape[1], config.head_dim
    frequencies = config.rope_theta ** (-np.arange(0, width, 2) / width)
    phases = np.outer(np.arange(count), frequencies)[:, None]
    cos, sin = (jnp.asarray(table, jnp.float32) for table in (np.cos(phases), np.sin(phases)))
    group = config.num_attention_heads // config.num_key_value_heads
    x = keep("model.embed_tokens", tensors["model.embed_tokens.weight"][ids])
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"
        attn, mlp = f"{name}.self_attn", f"{name}.mlp"
        y = norm(f"{name}.input_layernorm", x)
        q, k, v = (linear(f"{attn}.{p}_proj", y).reshape(*ids.shape, -1, width) for p in "qkv")
        q, k = rope(f"{attn}.q_rope", q), rope(f"{attn}.k_rope", k)
        k, v = (jnp.repeat(array, group, axis=2) for array in (k, v))
        scores = wide(jnp.einsum("bshd,bthd->bhst", q, k) / width**0.5)
        scores = jnp.where(np.tri(count, dtype=bool), scores, -1e30)
        p = jax.nn.softmax(scores, axis=-1).astype(jnp.bfloat16)
        y = keep(f"{attn}.attention", jnp.einsum("bhst,bthd->bshd", p, v))
        y = linear(f"{attn}.o_proj", y.reshape(*ids.shape, -1))
        x = keep(f"{name}.attention_residual", x + y)
        y = norm(f"{name}.post_attention_layernorm", x)
        gate, up = linear(f"{mlp}.gate_proj", y), linear(f"{mlp}.up_proj", y)
        x = keep(name, x + linear(f"{mlp}.down_proj", keep(f"{mlp}.act", jax.nn.silu(gate) * up)))
    linear("lm_head", norm("model.norm", x))
    return arrays


@pytest.mark.parametrize("how", ["eager", "jit", "jit without excess precision"])
def test_plain_jax(how):
    """Each operation rounds, and those of a sigmoid do, too; jit may go on with more digits."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=64,
    )
    tensors = {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in random_weights(config, 0, np.float32).items()
    }
    port = partial(plain_jax, config, {name: jnp.asarray(array) for name, array in tensors.items()})
    if how != "eager":
        options = {} if how == "jit" else {"xla_allow_excess_precision": False}
        port = jax.jit(port, compiler_options=options)
    ids = np.random.default_rng(0).integers(0, 64, (2, 24))
    trace, model = Trace(port(ids), ids), model_of(config, tensors)
    report = assert_no_false_alarm(trace, model)
    gates = [r for r in report.results if r.site.role == "mlp.act"]
    assert {r.judgement.verdict for r in gates} == {"FAIL"}  # by one rounding at the end
    assert all("each step of the sigmoid to bfloat16" in r.note for r in gates)
    profile = "XLA with excess precision" if how == "jit" else "XLA"
    assert assert_no_false_alarm(trace, model, profile=profile).verdict == "PASS"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers(smollm2, models, ids, dtype, attention):
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    trace = record_transformers(peer, torch.asarray(ids))
    report = assert_no_false_alarm(trace, models[dtype])
    # What it rounds on purpose has a name; and with that name given, nothing is left to warn of.
    assert dtype == "bfloat16" or report.verdict == "PASS"  # the trace names the engine
    named = {r.note.partition(" does:")[0] for r in report.results if r.profile}
    assert named <= {
        "rounds as transformers",
        "rounds as transformers with sdpa",
        "rounds as float32 phases",
    }
    allowed = assert_no_false_alarm(trace, models[dtype], profile="transformers")
    assert allowed.verdict == "PASS"
