"""`LlamaConfig` and its schemas: what files say, what is derived, what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given

from llama_layers import ConfigError, LlamaConfig
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


def test_old_files_mean_theta_10000():
    """Llama 2's own file, of transformers 4.31, has no rope_theta: there was no key for it."""
    old = without(LLAMA, "rope_theta") | {"rope_scaling": None}
    config = LlamaConfig.from_json(old | {"transformers_version": "4.31.0.dev0"})
    assert config.rope_theta == 10000.0
    for version in ("4.33.0", "5.0.0", "unknown", None):
        with pytest.raises(ConfigError, match="config: missing rope_theta"):
            LlamaConfig.from_json(old | {"transformers_version": version})
    with pytest.raises(ConfigError, match="config: missing rope_theta"):
        LlamaConfig.from_json(without(old, "transformers_version"))


def test_keys_that_change_no_number_are_passed_over():
    LlamaConfig.from_json(LLAMA | {"_name_or_path": "x", "temperature": 0.6, "new_key": None})


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
        (b"{", r"config\.json: expected a JSON file, got Expecting"),
        (b"\xff\xfe", r"config\.json: expected a JSON file, got .*codec"),
        (b"[1]", r"config\.json: expected a JSON object, got list"),
        (b"{}", r"config\.json: config: missing vocab_size"),
    ],
)
def test_refuses_files(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
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
    ("file", "key"),
    [
        (MISTRAL, "num_key_value_heads"),
        (MISTRAL, "sliding_window"),
        (MISTRAL, "rope_theta"),
        (QWEN2, "num_key_value_heads"),
        (QWEN2, "rope_theta"),
    ],
)
def test_families_must_say_more(file, key):
    with pytest.raises(ConfigError, match=f"config: missing {key}"):
        LlamaConfig.from_json(without(file, key))


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
        ({"dtype": "float32"}, "dtype: expected one, got 'bfloat16' and 'float32'"),
        ({"dtype": ["bfloat16"]}, r"dtype: expected one, got 'bfloat16' and \['bfloat16'\]"),
        ({"sliding_window": 0}, "sliding_window: expected a positive integer, got 0"),
        ({"layer_types": 3}, "layer_types: expected a list, got 3"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 32 entries, .*, got 1"),
        ({"layer_types": ["linear_attention"] * 32}, "layer_types: .*, got 'linear_attention'"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window: missing, and layer_types"),
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
        ({"rope_interleaved": True}, "rope_interleaved: expected false or nothing, got true"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: expected 1\.0 .*, got 0\.5"),
        ({"qk_norm": True}, "config: unknown qk_norm = True; if you know"),
        ({"quantization_config": {"bits": 4}}, "config: unknown quantization_config"),
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
