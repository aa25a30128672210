"""`LlamaConfig` and its schemas: what files say, what is derived, what is refused."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import ConfigError, LlamaConfig, RopeScaling, inv_freq
from llama_layers.config import read_config
from llama_layers.testing import configs

# Llama 3.1 8B as published.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
# The same in the words of transformers 5.
NESTED = {
    key: value
    for key, value in LLAMA.items()
    if key not in ("rope_theta", "rope_scaling", "torch_dtype", "transformers_version")
} | {
    "dtype": "bfloat16",
    "head_dim": 128,
    "rope_parameters": LLAMA["rope_scaling"] | {"rope_theta": 500000.0},
    "transformers_version": "5.0.0",
}
# Mistral 7B v0.1 and Qwen2 7B as published, less what they share with the above.
SHARED = {"architectures", "hidden_act", "tie_word_embeddings", "torch_dtype", "use_cache"}
MISTRAL = {key: LLAMA[key] for key in SHARED} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
QWEN2 = {key: LLAMA[key] for key in SHARED} | {
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_reads_a_published_file():
    config = LlamaConfig.from_json(LLAMA)
    for field in fields(config):
        if field.name in LLAMA and field.name != "rope_scaling":
            assert getattr(config, field.name) == LLAMA[field.name], field.name
    assert config.head_dim == 128
    assert config.dtype == "bfloat16"
    assert config.rope_scaling.rope_type == "llama3"
    assert config.rope_scaling.original_max_position_embeddings == 8192


def test_both_schemas_say_the_same():
    assert LlamaConfig.from_json(NESTED) == LlamaConfig.from_json(LLAMA)
    old_name = {
        "type" if key == "rope_type" else key: v for key, v in LLAMA["rope_scaling"].items()
    }
    assert LlamaConfig.from_json(LLAMA | {"rope_scaling": old_name}) == LlamaConfig.from_json(LLAMA)
    both = LLAMA | {"rope_parameters": NESTED["rope_parameters"]}
    assert LlamaConfig.from_json(both) == LlamaConfig.from_json(LLAMA)


def test_rope_parameters_of_plain_rope():
    plain = without(NESTED, "rope_parameters")
    for nested in ({"rope_theta": 1e4}, {"rope_theta": 1e4, "rope_type": "default"}):
        config = LlamaConfig.from_json(plain | {"rope_parameters": nested})
        assert config.rope_scaling is None
        assert config.rope_theta == 1e4


def test_reads_mistral():
    config = LlamaConfig.from_json(MISTRAL)
    assert config.sliding_window == 4096
    assert not config.qkv_bias
    assert not config.o_bias
    assert LlamaConfig.from_json(MISTRAL | {"sliding_window": None}).sliding_window is None
    wide = MISTRAL | {"hidden_size": 5120, "head_dim": 128}  # as Mistral Nemo is
    assert LlamaConfig.from_json(wide).head_dim == 128


def test_reads_qwen2():
    config = LlamaConfig.from_json(QWEN2)
    assert config.sliding_window is None
    assert config.qkv_bias
    assert not config.o_bias
    windowed = QWEN2 | {"use_sliding_window": True, "max_window_layers": 21}
    config = LlamaConfig.from_json(windowed)
    assert config.sliding_window == 131072
    assert config.layer_types == ("full_attention",) * 21 + ("sliding_attention",) * 7
    everywhere = LlamaConfig.from_json(windowed | {"max_window_layers": 0})
    assert (everywhere.sliding_window, everywhere.layer_types) == (131072, None)


def test_biases_of_llama():
    config = replace(LlamaConfig.from_json(LLAMA), attention_bias=True)
    assert config.qkv_bias
    assert config.o_bias


def test_silent_files_have_the_defaults_of_transformers():
    """Llama 2's own file has no rope_theta; the other numbers are those of the classes."""
    old = without(LLAMA, "rope_theta", "num_key_value_heads") | {"rope_scaling": None}
    config = LlamaConfig.from_json(old)
    assert (config.rope_theta, config.num_key_value_heads) == (10000.0, 32)
    silent = LlamaConfig.from_json(without(LLAMA, "bos_token_id", "eos_token_id"))
    assert (silent.bos_token_id, silent.eos_token_id) == (1, 2)
    assert LlamaConfig.from_json(LLAMA | {"eos_token_id": None}).eos_token_id is None
    config = LlamaConfig.from_json(
        without(MISTRAL, "num_key_value_heads", "sliding_window", "rope_theta")
    )
    assert (config.num_key_value_heads, config.sliding_window) == (8, 4096)
    assert config.rope_theta == 10000.0
    assert LlamaConfig.from_json(MISTRAL | {"num_key_value_heads": None}).num_key_value_heads == 32
    heads = QWEN2 | {"num_attention_heads": 32, "head_dim": 128}
    windowed = without(heads, "num_key_value_heads", "sliding_window", "max_window_layers")
    config = LlamaConfig.from_json(windowed | {"num_hidden_layers": 30, "use_sliding_window": True})
    assert (config.num_key_value_heads, config.sliding_window) == (32, 4096)
    assert config.layer_types == ("full_attention",) * 28 + ("sliding_attention",) * 2
    assert LlamaConfig.from_json(QWEN2 | {"num_key_value_heads": None}).num_key_value_heads == 28


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "x", "temperature": 0.6, "new_key": None},
        {"max_sequence_length": 2048, "badwordsids": [[0]]},
        {"sequence_parallel_enabled": False, "selective_checkpoint_enabled": False},
        {"move_model_to_device": True, "gradient_checkpointing": True, "model_max_length": 128},
        {"bias": False, "use_mrope": False, "eos_token": "</s>", "pad_token": "<unk>"},
        {"pruned_heads": {}, "tie_encoder_decoder": False, "add_cross_attention": False},
        {"rope_interleaved": False, "partial_rotary_factor": 1.0, "head_dim": None},
        {"attention_multiplier": 128**-0.5, "query_pre_attn_scalar": 128, "no_rope_layers": [1, 1]},
        {"quantization_config": None, "num_experts": 0, "layer_types": ["full_attention"] * 32},
        {"rope_scaling": LLAMA["rope_scaling"] | {"finetuned": True, "rope_theta": 500000.0}},
        {"original_max_position_embeddings": 8192, "hidden_act": "swish"},
        {"num_key_value_heads": 8, "auto_map": {"AutoModelForCausalLM": "modeling_llama.Llama"}},
        {"dtype": "bfloat16", "torch_dtype": "torch.float32"},
    ],
)
def test_keys_that_change_no_number_are_passed_over(change):
    assert LlamaConfig.from_json(LLAMA | change) == LlamaConfig.from_json(LLAMA)


@pytest.mark.parametrize(
    ("said", "dtype"), [("torch.float32", "float32"), ("half", "float16"), ("auto", None)]
)
def test_words_for_dtypes(said, dtype):
    assert LlamaConfig.from_json(LLAMA | {"torch_dtype": said}).dtype == dtype


def test_the_context_of_llama_1():
    old = without(LLAMA, "max_position_embeddings", "rope_scaling") | {"max_sequence_length": 2048}
    assert LlamaConfig.from_json(old).max_position_embeddings == 2048


@pytest.mark.parametrize("nothing", [None, False, {}, {"rope_type": "default"}])
def test_no_rope_scaling(nothing):
    assert LlamaConfig.from_json(LLAMA | {"rope_scaling": nothing}).rope_scaling is None


def test_the_trained_context_outside_rope_scaling():
    """As in Phi's files; where it is nowhere, transformers takes the whole context for it."""
    inside = LLAMA["rope_scaling"]
    outside = without(inside, "original_max_position_embeddings")
    for name in ("llama3", "yarn"):
        scaling = inside if name == "llama3" else {"type": name, "factor": 8.0}
        bare = without(scaling, "original_max_position_embeddings")
        file = LLAMA | {"rope_scaling": bare, "original_max_position_embeddings": 4096}
        assert LlamaConfig.from_json(file).rope_scaling.original_max_position_embeddings == 4096
    read = LlamaConfig.from_json(LLAMA | {"rope_scaling": outside}).rope_scaling
    assert read.original_max_position_embeddings == 131072
    with pytest.raises(ConfigError, match=r"original_max.*: expected one, got 8192 and 4096"):
        LlamaConfig.from_json(LLAMA | {"original_max_position_embeddings": 4096})


def test_windows_are_read_where_transformers_reads_them():
    """Llama has none, Mistral has one whatever Qwen2's switch says, Qwen2 asks its switch."""
    window = {"sliding_window": 72, "use_sliding_window": False}
    assert LlamaConfig.from_json(LLAMA | window).sliding_window is None
    assert LlamaConfig.from_json(MISTRAL | window).sliding_window == 72
    assert LlamaConfig.from_json(QWEN2 | window).sliding_window is None
    kinds = ["full_attention", "sliding_attention"] * 16
    config = LlamaConfig.from_json(MISTRAL | {"layer_types": kinds})
    assert [config.window_of(layer) for layer in (0, 1)] == [None, 4096]
    none = QWEN2 | {"use_sliding_window": True, "max_window_layers": 21, "sliding_window": None}
    assert LlamaConfig.from_json(none).window_of(27) is None


def test_special_tokens_that_the_vocabulary_does_not_have():
    ids = {"bos_token_id": -1, "eos_token_id": [], "pad_token_id": 2**32}
    config = LlamaConfig.from_json(LLAMA | ids)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (-1, (), 2**32)


def test_ignored_keys(tmp_path):
    scaling = LLAMA["rope_scaling"] | {"finetuned": True}
    file = LLAMA | {"max_sequence_length": 2048, "sliding_window": 5, "rope_scaling": scaling}
    file |= {"prefix": None}  # says nothing
    (tmp_path / "config.json").write_text(json.dumps(file), encoding="utf-8")
    config, ignored = read_config(tmp_path)
    assert config == LlamaConfig.from_json(LLAMA)
    bookkeeping = {"attention_dropout", "initializer_range", "pretraining_tp", "use_cache"}
    assert set(ignored) == {
        *bookkeeping,
        "transformers_version",
        "max_sequence_length",
        "sliding_window",
        "rope_scaling.finetuned",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    file=st.sampled_from([LLAMA, NESTED, MISTRAL, QWEN2]),
    added=st.dictionaries(st.text(min_size=1).map("x_{}".format), JSON, max_size=5),
    words=st.dictionaries(st.text(min_size=1).map("x_{}".format), st.integers(), max_size=3),
)
def test_any_key_that_nobody_reads_changes_nothing(file, added, words):
    changed = added | file
    if "rope_scaling" in file:
        changed |= {"rope_scaling": words | file["rope_scaling"]}
    assert LlamaConfig.from_json(changed) == LlamaConfig.from_json(file)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 2**31, 2**63, 10**400, 10**5000, 1e-308, 1e308, 0.5, -0.0])
ROPE_WORDS = "rope_type type factor rope_theta beta_fast beta_slow mscale attention_factor truncate"


@given(
    file=st.sampled_from([LLAMA, NESTED, MISTRAL, QWEN2 | {"use_sliding_window": True}]),
    data=st.data(),
)
def test_any_value_is_read_or_refused(file, data):
    """Whatever a file says, there is a config with frequencies or a `ConfigError`."""
    value = JSON | NUMBERS | st.sampled_from(["yarn", "llama3", "linear", "dynamic", "llama"])
    rope = st.dictionaries(st.sampled_from(ROPE_WORDS.split()), value)
    keys = ["architectures", "auto_map", "quantization_config", "layer_types", "llama_layers"]
    keys += ["rope_scaling", "rope_parameters", "original_max_position_embeddings", *file]
    change = data.draw(st.dictionaries(st.sampled_from(keys), value | rope, max_size=4))
    try:
        config = LlamaConfig.from_json(file | change)
    except ConfigError:
        return
    frequencies = inv_freq(config)
    assert ((frequencies > 0) & (frequencies < math.inf)).all()
    assert LlamaConfig.from_json(config.to_json()) == config


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
    "is_causal": (False, "llama_bidirec"),
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


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "mixtral", "Llama", ["llama"], 3])
def test_other_architectures_are_named_first(family):
    """Not the first of the keys that are unknown or missing."""
    with pytest.raises(
        ConfigError, match=r"model_type: expected one of llama, mistral, qwen2, got"
    ):
        LlamaConfig.from_json({"qk_norm": True, "num_experts": 8, "model_type": family})
    with pytest.raises(ConfigError, match=r"model_type \(one of llama, mistral, qwen2\)"):
        LlamaConfig.from_json(without(LLAMA, "model_type"))


def test_fields_that_a_family_does_not_read_are_kept_apart():
    """transformers' Llama has no window: a file of ours must not seem to give it one."""
    config = replace(LlamaConfig.from_json(LLAMA), sliding_window=3)
    content = config.to_json()
    assert "sliding_window" not in content
    assert LlamaConfig.from_json(content) == config
    for own in ({"vocab_size": 3}, [1]):
        with pytest.raises(ConfigError, match="llama_layers: expected an object with layer_types"):
            LlamaConfig.from_json(LLAMA | {"llama_layers": own})


@given(config=configs())
def test_round_trip(config):
    assert LlamaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("file", [LLAMA, NESTED, MISTRAL, QWEN2])
def test_reads_files_and_directories(tmp_path, file):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    expected = LlamaConfig.from_json(file)
    assert LlamaConfig.from_json(path) == expected
    assert LlamaConfig.from_json(str(path)) == expected
    assert LlamaConfig.from_json(tmp_path) == expected
    assert LlamaConfig.from_json(expected.to_json()) == expected


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


OTHER_SCALING = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads: expected a divisor .* 32, got 5"),
        ({"hidden_size": 4095}, "hidden_size: expected a multiple of .* 32 where head_dim"),
        ({"hidden_size": 32}, r"head_dim: expected an even number .*, got 1"),
        ({"head_dim": 3}, r"head_dim: expected an even number .*, got 3"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"model_type": "gemma"}, "model_type: expected one of llama, mistral, qwen2, got 'gemma'"),
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
        ({"rope_parameters": OTHER_SCALING}, "rope_scaling: differs from rope_parameters"),
        (
            {"rope_parameters": LLAMA["rope_scaling"] | {"rope_theta": 1e4}},
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


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


# Numbers of parameters, as published with the checkpoints.
PARAMETERS = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset):
    c = getattr(LlamaConfig, preset)()
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    total = c.num_hidden_layers * layer + embeddings + c.hidden_size
    assert total == PARAMETERS[preset]


def test_presets_are_all_checked():
    presets = {name for name in dir(LlamaConfig) if name.startswith(("llama", "smollm"))}
    assert presets == set(PARAMETERS)


def test_presets_agree_with_published_files():
    ours, published = LlamaConfig.llama3_1_8b(), LlamaConfig.from_json(LLAMA)
    assert replace(ours, dtype="bfloat16") == published
    small = LlamaConfig.llama3_2_1b()
    assert (small.head_dim, small.rope_scaling.factor) == (64, 32.0)
    assert LlamaConfig.llama3_2_3b().head_dim == 128
    assert LlamaConfig.llama3_8b().max_position_embeddings == 8192
    for preset, context, eps in (("llama_7b", 2048, 1e-6), ("llama2_7b", 4096, 1e-5)):
        config = getattr(LlamaConfig, preset)()
        assert (config.max_position_embeddings, config.rms_norm_eps) == (context, eps)
        assert (config.vocab_size, config.rope_theta) == (32000, 10000.0)
