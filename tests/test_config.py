"""`LlamaConfig` and its schemas: what files say, and what is derived."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import ConfigError, LlamaConfig, inv_freq
from llama_layers.config.llama_config import read_config
from llama_layers.testing import configs
from tests.support.published_configs import LLAMA, MISTRAL, NESTED, QWEN2, without


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
        without(
            MISTRAL,
            "num_key_value_heads",
            "sliding_window",
            "rope_theta",
            "bos_token_id",
            "eos_token_id",
        )
    )
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
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
        {
            "quantization_config": None,
            "num_experts": 0,
            "num_local_experts": 1,
            "layer_types": ["full_attention"] * 32,
        },
        {"attn_type_list": [1], "mlp_layer_types": ["dense"], "mlp_multipliers": [1.0, 1.0]},
        {"layers_block_type": ["attention"], "block_types": ["attention", "attention"]},
        {"rotary_dim": 128, "v_head_dim": 128, "attention_head_dim": 128},
        {"dim_model_base": 4096, "scale_depth": 32**0.5, "rope_ratio": 1, "scale_emb": 1},
        {"num_experts": 1, "n_routed_experts": 0, "moe_num_experts": 1, "num_moe_experts": 0},
        {"is_causal": True, "use_rope": True, "use_rotary_pos_emb": True, "no_bias": True},
        {"position_embedding_type": "rope", "pos_emb": "rotary", "norm_type": "rmsnorm"},
        {"layer_norm_type": "rms", "activation": "silu", "hidden_activation": "swish"},
        {"activation_function": "swiglu", "mlp_hidden_act": "silu", "qkv_bias": False},
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
    for switch in (False, True):
        switched = MISTRAL | window | {"use_sliding_window": switch}
        assert LlamaConfig.from_json(switched).sliding_window == 72
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
    file |= {"auto_map": {"AutoTokenizer": "own.Tokenizer"}}  # is read, to see whether it matters
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


def test_fields_that_a_family_does_not_read_are_kept_apart():
    """transformers' Llama has no window: a file of ours must not seem to give it one."""
    config = replace(LlamaConfig.from_json(LLAMA), sliding_window=3)
    content = config.to_json()
    assert "sliding_window" not in content
    assert LlamaConfig.from_json(content) == config
    for own in ({"vocab_size": 3}, [1]):
        with pytest.raises(ConfigError, match=r"llama_layers: expected an object with .*rope"):
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
