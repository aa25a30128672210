"""No false alarm on SmolLM2, whatever library computes it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llama_layers import Llama, LlamaWeights, forward, load
from llama_layers.backends.transfer import from_numpy
from llama_layers.verify import Trace, check, record
from llama_layers.verify.recorders import record_transformers

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
    assert assert_no_false_alarm(trace, weights, persona=excess).verdict == "PASS"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers(smollm2, models, ids, dtype, attention):
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    trace = record_transformers(peer, torch.asarray(ids))
    report = assert_no_false_alarm(trace, models[dtype])
    # What it rounds on purpose has a name; and with that name given, nothing is left to warn of.
    named = {r.note.partition(" does:")[0] for r in report.results if r.verdict == "WARN"}
    assert named <= {
        "rounds as transformers",
        "rounds as transformers with sdpa",
        "rounds as float32 phases",
    }
    allowed = assert_no_false_alarm(trace, models[dtype], persona="transformers")
    assert allowed.verdict == "PASS"
