"""GGUF files of each architecture that is read."""

from __future__ import annotations

from dataclasses import fields

import pytest

from llama_layers import LlamaConfig, load
from llama_layers.checkpoint.gguf.config import ARCHITECTURES
from llama_layers.config.families import SWITCHES
from tests.support import tiny

YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
# By architecture, what its file says beside what all say, and the config that it stands for.
CASES = {
    "ernie4_5": ({}, {}),
    "ernie4_5, biases": ({}, {"attention_bias": True, "mlp_bias": True}),
    "exaone": ({}, {}),
    "seed_oss": ({}, {"attention_bias": True}),
    "llama": ({}, {"attention_bias": True, "attention_out_bias": False}),
    "llama, output": ({}, {"attention_out_bias": True}),
    "qwen2": ({}, {}),
    "olmo2": ({}, {}),
    "olmo2, windows": (
        {"attention.sliding_window": 7, **YARN},
        {
            "model_type": "olmo3",
            "sliding_window": 7,
            "layer_types": 2 * ("sliding_attention",),
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "sliding_rope_scaling": False,
        },
    ),
    "exaone4": ({}, {}),
    "exaone4, windows": (
        {"attention.sliding_window": 7, "attention.sliding_window_pattern": [True, False]},
        {
            "sliding_window": 7,
            "layer_types": ("sliding_attention", "full_attention"),
            "layer_rope_theta": (tiny.CONFIG.rope_theta, 0.0),
        },
    ),
    "glm4": ({"rope.dimension_count": 4}, {"partial_rotary_factor": 0.5}),
    "glm4, biases": ({}, {"attention_bias": True}),
    "hunyuan-dense": ({}, {"model_type": "hunyuan_v1_dense"}),
}


def of(architecture, changes):
    """The config of tiny weights, with the switches of a family."""
    plain = {field.name: getattr(tiny.CONFIG, field.name) for field in fields(tiny.CONFIG)}
    given = {name: value for name, value in plain.items() if name not in SWITCHES}
    return LlamaConfig(**given | {"model_type": architecture} | changes)


@pytest.mark.parametrize("case", CASES)
def test_weights_and_config(tmp_path, case):
    keys, changes = CASES[case]
    architecture = case.partition(",")[0]
    assert architecture in ARCHITECTURES
    config = of(architecture, changes)
    weights = tiny.arrays(config)
    stored = tiny.fused(weights, ["mlp.gate_up_proj"]) if architecture == "glm4" else weights
    file = tiny.write_gguf(
        tmp_path / "m.gguf", stored, config, architecture=architecture, keys=keys
    )
    model = load(file)
    assert model.config == config
    tiny.assert_holds(model, weights)
