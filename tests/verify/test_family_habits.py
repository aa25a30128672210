"""Roundings that an engine makes in some families, and that are a mistake in the others."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import Llama, LlamaConfig
from llama_layers.config.families import FAMILIES
from llama_layers.model.tensor_names import expected_tensors
from llama_layers.verify import check, record
from llama_layers.verify.profiles import profile_named

BFLOAT16 = ml_dtypes.bfloat16
# Whose norms in transformers multiply with the weight in float32, read in its sources.
ONCE = {"gemma", "gemma2", "gemma3_text", "vaultgemma", "olmo2", "olmo3", "helium"}


def traced(family):
    """The last norm of a model, with its input, in bfloat16; the row rounded before the weight."""
    sizes = {"vocab_size": 5, "hidden_size": 32, "intermediate_size": 8, "head_dim": 8}
    config = LlamaConfig(
        **sizes,
        model_type=family,
        num_hidden_layers=1,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=64,
    )
    rng = np.random.default_rng(0)
    shapes = expected_tensors(config).items()
    model = Llama.from_state_dict(
        {name: rng.standard_normal(shape).astype(BFLOAT16) for name, shape in shapes}, config
    )
    trace = record(model, np.arange(40)[None] % 5, sites=["model.layers.0", "model.norm"])
    x = trace.arrays["model.layers.0"].astype(np.float64)
    weight = np.asarray(model.weights.norm, np.float64) + config.norm_weight_offset
    row = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    arrays = {**trace.arrays, "model.norm": (row.astype(BFLOAT16) * weight).astype(BFLOAT16)}
    return model, trace, replace(trace, arrays=arrays)


def norm_of(trace, model, **options):
    (result,) = (r for r in check(trace, model, **options).results if r.site.name == "model.norm")
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_rounded_before_the_weight(family):
    model, right, trace = traced(family)
    assert norm_of(right, model).verdict == "PASS"
    result, named = norm_of(trace, model), norm_of(trace, model, profile="transformers")
    if family not in ONCE:
        assert (result.verdict, result.profile) == ("WARN", "transformers with sdpa")
        assert named.verdict == "PASS"
        return
    for found in (result, named):
        assert found.verdict == "FAIL"
        assert [cause.name for cause in found.explanations] == ["norm computed in bfloat16"]
        assert "round the normalised row to bfloat16" in found.explanations[0].detail
    engine = replace(trace, metadata={"engine": "transformers 5"})
    assert norm_of(engine, model).verdict == "FAIL"
    ranks = "transformers, tensor parallel, 2 ranks, float32 reduce"
    assert norm_of(trace, model, profile=ranks).verdict == "FAIL"


def test_own_profiles_are_taken_as_they_are():
    model, _, trace = traced("gemma")
    own = replace(profile_named("transformers"), name="transformers, ours")
    assert norm_of(trace, model, profile=own).verdict == "PASS"
