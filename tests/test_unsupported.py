"""Refusals of other families, with what they have that the block of Llama does not."""

from __future__ import annotations

import re

import pytest

from llama_layers import CheckpointError, ConfigError, LlamaConfig, load
from llama_layers.config.families import FAMILIES
from llama_layers.config.unsupported import _OF_NAME
from tests.support import gguf_files

# By model type, content of its published config, and what the message says.
CASES = {
    "qwen3_moe": ({"num_experts": 128, "num_experts_per_tok": 8}, "experts, of which a router"),
    "mixtral": ({}, r"experts, of which a router .* \(MoE\): not supported$"),
    "deepseek_v3": (
        {"kv_lora_rank": 512, "n_routed_experts": 256, "rms_norm_eps": 1e-6},
        r"compressed vector \(MLA\) and experts, of which",
    ),
    "minicpm3": ({"kv_lora_rank": 256}, r"\(MLA\): not supported$"),
    "qwen3_next": ({"linear_num_key_heads": 16, "num_experts": 512}, "linear .* and experts"),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, "or a convolution"),
    "bart": ({"is_encoder_decoder": True, "encoder_layers": 12}, "cross-attention to an encoder"),
    "qwen2_vl": ({"vision_config": {"depth": 32}}, "a tower for images or sound: not"),
    "cohere2": ({"layer_norm_eps": 1e-5}, "subtract the mean and attention and MLP side by side"),
    "gpt_neox": (
        {"layer_norm_eps": 1e-5, "use_parallel_residual": True},
        "norms that subtract the mean and attention and MLP side by side",
    ),
    "bert": ({"layer_norm_eps": 1e-12}, "norms that subtract the mean: not supported"),
    "llama4": ({"text_config": {"num_local_experts": 16}}, "experts, of which"),
    "chunked": ({"layer_types": ["chunked_attention"]}, "layers of the type chunked_attention"),
    "arcee": ({}, "an MLP without a gate: not supported"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_named(name):
    content, words = CASES[name]
    begins = f"model_type: expected one of {', '.join(FAMILIES)}, got '{name}', which has "
    with pytest.raises(ConfigError, match=re.escape(begins) + ".*" + words):
        LlamaConfig.from_json({"model_type": name, **content})


@pytest.mark.parametrize(
    "content", [{}, {"num_experts": 0, "kv_lora_rank": None}, {"text_config": 3}]
)
def test_an_unknown_family_has_no_reason(content):
    with pytest.raises(ConfigError, match=r"got 'of tomorrow'$"):
        LlamaConfig.from_json({"model_type": "of tomorrow", **content})


def test_what_is_supported_is_not_listed():
    assert not FAMILIES.keys() & _OF_NAME.keys()


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        ("qwen3moe", {"expert_count": ("u32", 128)}, "experts, of which a router"),
        ("deepseek2", {"attention.kv_lora_rank": ("u32", 512)}, r"\(MLA\): not supported"),
        ("mamba", {}, "a state space or"),
        ("command-r", {}, "subtract the mean and attention and MLP side by side"),
        ("falcon-h1", {"ssm.state_size": ("u32", 256)}, "a state space or"),
        ("gptneox", {"attention.layer_norm_epsilon": ("f32", 1e-5)}, "subtract the mean"),
    ],
)
def test_the_reason_is_named_for_gguf(tmp_path, architecture, keys, words):
    file = gguf_files.write_model(
        tmp_path / "m.gguf",
        {"general.architecture": ("str", architecture)}
        | {f"{architecture}.{key}": value for key, value in keys.items()},
    )
    with pytest.raises(CheckpointError, match=f"got '{architecture}', which has .*{words}"):
        load(file)
