"""`LlamaConfig`: what is refused, and how it is said."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest

from llama_layers import ConfigError, LlamaConfig, RopeScaling
from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import read_config
from tests.support.published_configs import LLAMA, MISTRAL, NESTED, QWEN2, without

KNOWN = ", ".join(FAMILIES)

# What other architectures read: the key, a value that changes the maths there, whose it is.
ELSEWHERE = {
    "attention_multiplier": (0.0078125, "granite"),
    "embedding_multiplier": (12.0, "granite"),
    "residual_multiplier": (0.22, "granite"),
    "logits_scaling": (8.0, "granite"),
    "logit_scale": (0.0625, "cohere"),
    "scale_emb": (12, "minicpm"),
    "scale_depth": (1.4, "minicpm"),
    "dim_model_base": (256, "minicpm"),
    "lm_head_multiplier": (0.5, "falcon_h1"),
    "key_multiplier": (0.5, "falcon_h1"),
    "final_logit_softcapping": (30.0, "gemma2"),
    "attn_logit_softcapping": (50.0, "gemma2"),
    "query_pre_attn_scalar": (256, "gemma2"),
    "hidden_activation": ("gelu_pytorch_tanh", "gemma2"),
    "use_bidirectional_attention": (True, "gemma3"),
    "rope_local_base_freq": (10000.0, "gemma3"),
    "partial_rotary_factor": (0.5, "phi"),
    "rotary_pct": (0.25, "gpt_neox"),
    "use_parallel_residual": (True, "gpt_neox"),
    "rotary_dim": (64, "gptj"),
    "clip_qkv": (8.0, "olmo"),
    "qk_norm": (True, "chameleon"),
    "use_qk_norm": (True, "llama4"),
    "no_rope_layers": ([1, 1, 1, 0], "llama4"),
    "attention_chunk_size": (8192, "llama4"),
    "attn_temperature_tuning": (4, "llama4"),
    "no_rope_layer_interval": (4, "smollm3"),
    "sliding_window_pattern": (6, "cohere2"),
    "num_local_experts": (8, "mixtral"),
    "num_experts": (64, "qwen3_moe"),
    "n_routed_experts": (64, "deepseek_v2"),
    "kv_lora_rank": (512, "deepseek_v2"),
    "v_head_dim": (64, "deepseek_v2"),
    "rope_interleave": (True, "deepseek_v3"),
    "rope_interleaved": (True, "glm"),
    "use_mrope": (True, "qwen2_vl"),
    "use_logn_attn": (True, "qwen"),
    "no_bias": (False, "qwen"),
    "bias": (True, "internlm"),
    "qkv_bias": (True, "internlm"),
    "add_bias_linear": (True, "chatglm"),
    "rope_ratio": (500, "chatglm"),
    "apply_residual_connection_post_layernorm": (True, "chatglm"),
    "alibi": (True, "falcon"),
    "parallel_attn": (True, "falcon"),
    "position_embedding_type": ("alibi", "bloom"),
    "norm_type": ("layernorm", "openelm"),
    "use_sliding_window": (True, "qwen2"),
    "layer_types": (["linear_attention"] * 32, "qwen3_next"),
    "per_layer_config": ({"3": {"num_attention_heads": 8}}, "transformers 5"),
    "block_configs": ([{}], "nemotron-nas"),
    "swiglu_limit": (7.0, "gpt_oss"),
    "embedding_scale": (50.0, "hrm_text"),
    "mlp_multipliers": ([1.0, 0.5], "falcon_h1"),
    "block_types": (["recurrent", "attention"], "recurrent_gemma"),
    "logits_soft_cap": (30.0, "recurrent_gemma"),
    "hidden_size_per_layer_input": (256, "gemma3n"),
    "attention_value_scale": (0.707, "mimo_v2_flash"),
}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_keys_that_change_the_maths_elsewhere(key):
    value, _ = ELSEWHERE[key]
    with pytest.raises(ConfigError, match=rf"config: {key} = .*, and llama does not read it"):
        LlamaConfig.from_json(LLAMA | {key: value})
    assert LlamaConfig.from_json(LLAMA | {key: None}) == LlamaConfig.from_json(LLAMA)


@pytest.mark.parametrize("key", ["attention_bias", "mlp_bias", "use_bias"])
def test_biases_that_mistral_does_not_have(key):
    with pytest.raises(ConfigError, match=f"config: {key} = True .* mistral does not read it"):
        LlamaConfig.from_json(MISTRAL | {key: True})
    expected = LlamaConfig.from_json(QWEN2)
    if key != "mlp_bias":  # Qwen2 has biases whatever a file says, and its tensors are checked
        assert LlamaConfig.from_json(QWEN2 | {key: True}) == expected
    assert LlamaConfig.from_json(QWEN2 | {key: False}) == expected


def test_custom_code_may_read_anything():
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}}
    with pytest.raises(ConfigError, match="unknown speed = 3, which the custom code"):
        LlamaConfig.from_json(LLAMA | code | {"speed": 3})
    inert = {"gradient_checkpointing": True, "_name_or_path": "x", "speed": None, "bias": False}
    words = {"rope_scaling": LLAMA["rope_scaling"] | {"finetuned": True}}  # as YaRN's models have
    assert LlamaConfig.from_json(LLAMA | code | inert | words) == LlamaConfig.from_json(LLAMA)
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "speed": 3}
    assert LlamaConfig.from_json(LLAMA | tokenizer) == LlamaConfig.from_json(LLAMA)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq, 4 bits\)"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, r"\(awq, 4 bits\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"\(fp8\)"),
        (
            {"quantization_config": {"_load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}},
            r"\(bitsandbytes, 8 bits\)",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8}}},
                }
            },
            r"\(compressed-tensors, 8 bits\)",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"\(MLX, 4 bits\)"),
        ({"quantization_config": "x"}, "weights are"),
    ],
)
def test_quantised_weights(change, what):
    with pytest.raises(ConfigError, match=f"{what}.* not supported; use the unquantised model"):
        LlamaConfig.from_json(LLAMA | change)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForCausalLMEagle3"]},
        {"architectures": ["PEagleDraftModel"]},
        {"draft_vocab_size": 32000},
    ],
)
def test_draft_heads(change):
    for file in (LLAMA, without(LLAMA, "rope_theta")):
        with pytest.raises(ConfigError, match="expected a whole model, got a draft head"):
            LlamaConfig.from_json(file | change)


def test_heads_without_logits(tmp_path):
    """The config is a Llama's; a checkpoint that has it gives no logits."""
    for name in ("LlamaForSequenceClassification", "Qwen2ForRewardModel"):
        file = LLAMA | {"architectures": [name]}
        (tmp_path / "config.json").write_text(json.dumps(file), encoding="utf-8")
        with pytest.raises(ConfigError, match=f"config.json: architectures: .* got {name}"):
            read_config(tmp_path)
        assert LlamaConfig.from_json(tmp_path) == LlamaConfig.from_json(LLAMA)
    both = LLAMA | {"architectures": ["LlamaForCausalLM", "LlamaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(both), encoding="utf-8")
    assert read_config(tmp_path)[0] == LlamaConfig.from_json(LLAMA)


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron", "mixtral", "Llama", ["llama"], 3])
def test_other_architectures_are_named_first(family):
    """Not the first of the keys that are unknown or missing."""
    with pytest.raises(ConfigError, match=f"model_type: expected one of {KNOWN}, got"):
        LlamaConfig.from_json({"qk_norm": True, "num_experts": 8, "model_type": family})
    with pytest.raises(ConfigError, match=rf"model_type \(one of {KNOWN}\)"):
        LlamaConfig.from_json(without(LLAMA, "model_type"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config\.json: expected a JSON object: Expecting"),
        (b"\xff\xfe", r"config\.json: expected UTF-8, got byte 255"),
        (b"[1]", r"config\.json: expected a JSON object, got list"),
        (b"[" * 100_000, r"config\.json: expected a JSON object, got one nested too deeply"),
        (
            b'{"temperature": ' + b"9" * 5000 + b"}",
            r"config\.json: expected a JSON object: Exceeds",
        ),
        (b"{}", r"config\.json: missing vocab_size"),
    ],
)
def test_refuses_files(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_json(tmp_path)


def test_large_files_are_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        os.truncate(file.fileno(), 2**40)  # takes no room on the disk, and all of memory if read
    with pytest.raises(ConfigError, match=r"config\.json: expected at most 16777216 bytes, got"):
        LlamaConfig.from_json(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        LlamaConfig.from_json(tmp_path)


@pytest.mark.parametrize("file", [LLAMA, NESTED, MISTRAL, QWEN2])
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "model_type",
    ],
)
def test_files_must_say(file, key):
    for content in (without(file, key), file | {key: None}):
        with pytest.raises(ConfigError, match=rf"config: missing .*{key}"):
            LlamaConfig.from_json(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads: expected a divisor .* 32, got 5"),
        ({"hidden_size": 4095}, "hidden_size: expected a multiple of .* 32 where head_dim"),
        ({"hidden_size": 32}, r"head_dim: expected an even number .*, got 1"),
        ({"head_dim": 3}, r"head_dim: expected an even number .*, got 3"),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of silu, gelu_pytorch_tanh, got 'gelu'"),
        (
            {"model_type": "olmo2", "llama_layers": {"norm_placement": "both"}},
            "norm_placement: expected 'after', which the names of the norms in a olmo2 stand for",
        ),
        (
            {"model_type": "phi"},
            f"model_type: expected one of {KNOWN}, got 'phi'",
        ),
        ({"torch_dtype": "int8"}, "dtype: expected one of float16, .*, got 'int8'"),
        ({"dtype": ["bfloat16"]}, r"dtype: expected one of float16, .*, got \['bfloat16'\]"),
        ({"model_type": ["llama"]}, r"model_type: expected one of .*, got \['llama'\]"),
        ({1: 2}, "config: expected keys that are strings, got 1"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings: expected at most 9007"),
        ({"vocab_size": 10**5000}, "vocab_size: expected at most .*, got an integer of 16610 bits"),
        ({"head_dim": 2**40}, "head_dim: expected at most 65536"),
        ({"rms_norm_eps": 1e300}, r"rms_norm_eps: expected a number from 1e-30 to 1e\+30, got 1e"),
        ({"rope_theta": 1e-300}, "rope_theta: expected a number from 1e-30"),
        ({"vocab_size": 0}, "vocab_size: expected a positive integer, got 0"),
        ({"vocab_size": -5}, "vocab_size: expected a positive integer, got -5"),
        ({"vocab_size": 3.0}, r"vocab_size: expected a positive integer, got 3\.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 10000, got 1000000000"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers: expected a positive integer, got '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer, got True"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps: expected a positive finite number, got 0\.0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps: expected a positive finite number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a positive finite number, got '1e-5'"),
        ({"rope_theta": math.inf}, "rope_theta: expected a positive finite number, got inf"),
        ({"rope_theta": 10**400}, "rope_theta: expected a positive finite number"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected an integer, got '</s>'"),
        ({"eos_token_id": [1, None]}, "eos_token_id: expected an integer, got None"),
        ({"bos_token_id": [1]}, r"bos_token_id: expected an integer, got \[1\]"),
        ({"pad_token_id": True}, "pad_token_id: expected an integer, got True"),
        ({"rope_theta": math.nan}, "rope_theta: expected a positive finite number, got nan"),
        ({"attention_bias": 1}, "attention_bias: expected true or false, got 1"),
        ({"mlp_bias": "no"}, "mlp_bias: expected true or false, got 'no'"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings: expected true or false, got 0"),
        ({"qk_norm": True}, "config: qk_norm = True changes .* mislabelled"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object, got 'linear'"),
        ({"rope_parameters": 3}, "rope_parameters: expected an object, got 3"),
        ({"is_causal": False}, "is_causal: expected true or nothing, got False"),
        ({"is_causal": None}, "is_causal: expected true or nothing, got None"),
        ({"query_pre_attn_scalar": 10**400}, "config: query_pre_attn_scalar = .* mislabelled"),
        (
            {"rope_scaling": LLAMA["rope_scaling"] | {"rope_theta": 1e4}},
            r"rope_theta: expected one, got 500000\.0 and 10000\.0",
        ),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_json(LLAMA | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 0}, "sliding_window: expected a positive integer, got 0"),
        ({"sliding_window": 2**63}, "sliding_window: expected at most 9007199254740992"),
        ({"layer_types": 3}, "layer_types: expected a list, got 3"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 32 entries, .*, got 1"),
        ({"layer_types": ["linear_attention"] * 32}, "layer_types: .*, got 'linear_attention'"),
        (
            {"layer_types": ["sliding_attention"] * 32, "sliding_window": None},
            "sliding_window: missing, and layer_types",
        ),
    ],
)
def test_refuses_windows_of_mistral(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_json(MISTRAL | change)


@pytest.mark.parametrize("scaling", [3, "linear", ["linear"]])
def test_refuses_what_is_not_a_scaling(scaling):
    with pytest.raises(ConfigError, match=r"rope_scaling: expected a RopeScaling, .*, got"):
        replace(LlamaConfig.llama2_7b(), rope_scaling=scaling)


def test_yarn_divides_by_the_logarithm_of_theta():
    with pytest.raises(ConfigError, match="rope_theta: expected another number than 1 with yarn"):
        replace(
            LlamaConfig.llama2_7b(), rope_theta=1.0, rope_scaling=RopeScaling("yarn", factor=2.0)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_window_layers": None}, "missing max_window_layers, and use_sliding_window is true"),
        ({"max_window_layers": "21"}, "max_window_layers: expected a positive integer, got '21'"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers: expected a positive integer, got '28'"),
        ({"use_sliding_window": "yes"}, "use_sliding_window: expected true or false, got 'yes'"),
    ],
)
def test_refuses_windows_of_qwen2(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_json(QWEN2 | {"use_sliding_window": True} | change)


@pytest.mark.parametrize("name", ["vocab_size", "rms_norm_eps", "attention_bias", "model_type"])
def test_only_some_fields_may_be_none(name):
    with pytest.raises(ConfigError, match=f"^{name}: expected .*, got None$"):
        replace(LlamaConfig.llama2_7b(), **{name: None})


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)
