"""What the class of each family in transformers has, by its code: names of norms, and defaults."""

from __future__ import annotations

import math

import pytest

from llama_layers import LlamaConfig
from llama_layers.checkpoint import expected_tensors
from llama_layers.config.families import FAMILIES

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
LLAMA = "input_layernorm post_attention_layernorm"
PER_HEAD = "self_attn.q_norm self_attn.k_norm"
AFTER = f"post_attention_layernorm post_feedforward_layernorm {PER_HEAD}"
AROUND = f"{LLAMA} pre_feedforward_layernorm post_feedforward_layernorm"
NORMS = {
    "qwen3": f"{LLAMA} {PER_HEAD}",
    "olmo2": AFTER,
    "olmo3": AFTER,
    "exaone4": AFTER,
    "glm4": f"{LLAMA} post_self_attn_layernorm post_mlp_layernorm",
    "hunyuan_v1_dense": f"{LLAMA} self_attn.query_layernorm self_attn.key_layernorm",
    "hyperclovax": f"{LLAMA} post_norm1 post_norm2",
    "gemma2": AROUND,
    "gemma3_text": f"{AROUND} {PER_HEAD}",
    "vaultgemma": "input_layernorm pre_feedforward_layernorm",
}


def config_of(family, **more):
    return LlamaConfig.from_json(SIZES | {"model_type": family} | more)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_norms(family):
    names = expected_tensors(config_of(family))
    start, end = "model.layers.5.", ".weight"
    found = {
        name.removeprefix(start).removesuffix(end)
        for name in names
        if name.startswith(start) and "norm" in name
    }
    assert found == set(NORMS.get(family, LLAMA).split())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factor_of_the_embedding(family):
    root = math.sqrt(48) if "gemma" in family else 1.0
    assert config_of(family).embedding_multiplier == root


@pytest.mark.parametrize(
    ("family", "full"),
    [
        ("gemma2", {1, 3, 5, 7}),
        ("vaultgemma", {1, 3, 5, 7}),
        ("gemma3_text", {5}),
        ("olmo3", {3, 7}),
        ("exaone4", {3, 7}),
        ("cwm", {0, 4}),
        ("granite_swa", {0, 4}),
    ],
)
def test_layers_without_a_window(family, full):
    config = config_of(family, sliding_window=7)
    assert {i for i in range(8) if config.window_of(i) is None} == full
