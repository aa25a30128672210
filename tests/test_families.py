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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_says_it_in_the_words_of_the_family(family):
    config = config_of(family)
    content = config.to_json()
    assert "llama_layers" not in content
    assert LlamaConfig.from_json(content) == config
    own = {"ernie4_5": {"use_bias": False}, "exaone": {"num_layers": 8, "layer_norm_epsilon": 1e-5}}
    assert content.items() >= own.get(family, {}).items()


def test_defaults_of_a_silent_file():
    """As the class of Gemma has them."""
    sizes = {key: value for key, value in SIZES.items() if key not in ("head_dim", "rope_theta")}
    config = LlamaConfig.from_json(sizes | {"model_type": "gemma3_text"})
    assert (config.head_dim, config.rope_theta) == (256, 1e6)
    assert config.layer_rope_theta == (1e4,) * 5 + (1e6,) + (1e4,) * 2
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("family", "theta"),
    [
        *(("smollm3", 2e6), ("cwm", 1e6), ("ministral3", 1e6), ("helium", 1e5), ("phi3", 1e4)),
        *(("olmo3", 5e5), ("exaone", 5e5), ("ernie4_5", 5e5)),
    ],
)
def test_the_theta_of_a_silent_file(family, theta):
    sizes = {key: value for key, value in SIZES.items() if key != "rope_theta"}
    assert LlamaConfig.from_json(sizes | {"model_type": family}).rope_theta == theta


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
