"""What the metadata of a GGUF file means: the config, what is ignored, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llama_layers import CheckpointError, ConfigError, load
from llama_layers.checkpoint import open_checkpoint
from tests.support import tiny
from tests.support.gguf_files import write_model


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8, 3e-6, 0.00012345])
def test_numbers_are_the_decimals_that_were_rounded_to_float32(tmp_path, eps):
    keys = {"attention.layer_norm_rms_epsilon": eps, "rope.freq_base": 1000000.0}
    config = load(tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), keys=keys)).config
    assert (config.rms_norm_eps, config.rope_theta) == (eps, 1000000.0)


@pytest.mark.parametrize("theta", [12345.678901234567, 1e4 + 2**-30, 1e29])
def test_numbers_in_float64_are_not_rounded(tmp_path, theta):
    path = write_model(tmp_path / "m.gguf", {"llama.rope.freq_base": ("f64", theta)})
    assert open_checkpoint(path).config.rope_theta == theta


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("theta", [1e39, 1e300, -1e300, math.inf, math.nan])
def test_numbers_that_are_too_large_for_float32_are_refused(tmp_path, theta):
    path = write_model(tmp_path / "m.gguf", {"llama.rope.freq_base": ("f64", theta)})
    with pytest.raises(ConfigError, match=r"rope_theta: expected a .*number"):
        open_checkpoint(path)


def test_the_keys_that_may_be_missing(tmp_path):
    keys = dict.fromkeys(["rope.freq_base", "attention.head_count_kv", "vocab_size"])
    config = replace(tiny.CONFIG, num_key_value_heads=4)
    tokens = {"tokenizer.ggml.tokens": [str(i) for i in range(40)]}
    path = tiny.write_gguf(
        tmp_path / "m.gguf", tiny.arrays(config), config, keys=keys, metadata=tokens
    )
    assert load(path).config == config


def test_special_tokens(tmp_path):
    ids = {"bos": 1, "eos": 2, "padding": 3}
    metadata = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    config = load(tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), metadata=metadata)).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize("architecture", ["olmo", "qwen2moe", "cohere2"])
def test_another_architecture(tmp_path, architecture):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), architecture=architecture)
    with pytest.raises(
        CheckpointError,
        match=f"m.gguf: expected one of the architectures .*, got '{architecture}'",
    ):
        load(path)


@pytest.mark.parametrize(
    "value", [None, ("u32", 1), ("arr[i32]", [1, 2]), ("arr[str]", ["llama"]), ("str", "")]
)
def test_an_architecture_that_is_no_name(tmp_path, value):
    path = write_model(tmp_path / "m.gguf", {"general.architecture": value})
    with pytest.raises(CheckpointError, match=f"^{path}: expected one of the architectures llama,"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("tensor_data_layout", "str", "Meta AI original pth"),
        ("pooling_type", "u32", 3),
        ("decoder_start_token_id", "u32", 2),
        ("attention.layer_norm_epsilon", "f32", 1e-3),
        ("attention.sliding_window_pattern", "u32", 2),
        ("leading_dense_block_count", "u32", 1),
        ("rope.scaling.finetuned", "bool", True),
        ("rope.scaling.original_context_length", "u32", 32),
        ("rope.scaling.yarn_beta_fast", "f32", 3.0),
        ("classifier.output_labels", "arr[str]", ["yes", "no"]),
        ("some_maker.of_files", "arr[f32]", [1.0, 2.0]),
        ("some_maker.note", "str", b"\xff"),
    ],
)
def test_keys_that_llama_cpp_does_not_read_are_listed(tmp_path, key, kind, value):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", {f"llama.{key}": (kind, value)}))
    assert checkpoint.config == open_checkpoint(write_model(tmp_path / "m.gguf", {})).config
    assert checkpoint.ignored_keys == (f"llama.{key}",)


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("expert_count", "u32", 0),
        ("expert_used_count", "u32", 0),
        ("use_parallel_residual", "bool", False),
        ("attention.causal", "bool", True),
        ("attention.clamp_kqv", "f32", 0.0),
        ("attention.max_alibi_bias", "f32", 0.0),
        ("attention.scale", "f32", 8**-0.5),
        ("attention.scale", "f32", 0.0),
        ("attention.sliding_window", "u32", 0),
        ("attention.sliding_window", "u32", 64),
        ("attention.sliding_window", "u32", 4096),
        ("attention.value_length", "u32", 8),
        ("attn_logit_softcapping", "f32", 0.0),
        ("final_logit_softcapping", "f32", 0.0),
        ("logit_scale", "f32", 1.0),
        ("logit_scale", "f32", 0.0),
        ("residual_scale", "f32", 1.0),
        ("embedding_scale", "f32", 1.0),
        ("hidden_activation", "str", "silu"),
        ("rope.dimension_sections", "arr[i32]", [0, 0, 0, 0]),
        ("rope.scale_linear", "f32", 1.0),
        ("rope.scaling.alpha", "f32", 0.0),
        ("rope.scaling.attn_factor", "f32", 1.0),
        ("rope.dimension_count", "u32", 8),
        ("attention.head_count", "arr[u32]", [4, 4]),
        ("attention.head_count_kv", "arr[i32]", [2, 2]),
        ("feed_forward_length", "arr[u32]", [48, 48]),
    ],
)
def test_keys_that_say_what_is_so_anyway(tmp_path, key, kind, value):
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", {f"llama.{key}": (kind, value)}))
    assert checkpoint.config == open_checkpoint(write_model(tmp_path / "m.gguf", {})).config
    assert checkpoint.ignored_keys == ()


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("expert_count", "u32", 8, "expected 0 or nothing, got 8, which changes the maths"),
        ("use_parallel_residual", "bool", True, "expected 0 or nothing, got True"),
        ("attention.causal", "bool", False, "expected True or nothing, got False"),
        ("attention.causal", "str", "true", "expected True or nothing, got 'true'"),
        ("attention.clamp_kqv", "f32", 8.0, "got 8.0"),
        ("attention.clamp_kqv", "f32", math.nan, "got nan"),
        ("attention.scale", "f32", 0.25, "expected 0.35355339059327.* or nothing, got 0.25"),
        ("attention.sliding_window", "u32", 63, "expected 0 or nothing, got 63"),
        ("attention.sliding_window", "f32", 99.0, "expected 0 or nothing, got 99.0"),
        ("attn_logit_softcapping", "f32", 50.0, "got 50.0"),
        ("logit_scale", "f32", 0.5, "expected 1.0 or nothing, got 0.5"),
        ("hidden_activation", "str", "gelu", "expected 'silu' or nothing, got 'gelu'"),
        ("rope.dimension_sections", "arr[i32]", [2, 2, 0], "got an array of 3 numbers"),
        ("swiglu_clamp_exp", "arr[f32]", [0.0, 7.0], "got an array of 2 numbers, .0. 7.."),
        ("rope.scaling.attn_factor", "f32", 1.5, "expected 1.0 without yarn, got 1.5"),
        ("rope.scaling.type", "str", "longrope", "expected none, linear or yarn, got 'longrope'"),
        ("rope.scaling.type", "arr[str]", ["none"], "expected a string, got an array of 1 str"),
        ("rope.scaling.type", "u32", 1, "expected a string, got 1"),
        ("rope.scaling.factor", "str", "2", "expected a number, got '2'"),
        ("rope.scaling.factor", "f32", math.nan, "factor: expected .* got nan"),
        ("rope.scaling.factor", "f32", -2.0, "factor: expected"),
        ("rope.freq_base", "f32", 0.0, "rope_theta: expected a positive finite number, got 0.0"),
        ("rope.freq_base", "bool", True, "rope.freq_base: expected a number, got True"),
        ("attention.layer_norm_rms_epsilon", "f64", math.inf, "rms_norm_eps: .* got inf"),
        ("block_count", "u32", 0, "num_hidden_layers: expected a positive integer, got 0"),
        ("block_count", "u32", 2**32 - 1, "num_hidden_layers: expected at most 10000"),
        ("block_count", "u64", 2**64 - 1, "num_hidden_layers: expected at most 10000"),
        ("block_count", "f32", 2.0, "block_count: expected an integer, got 2.0"),
        ("block_count", "arr[u32]", [2, 2], "block_count: expected an integer, got an array"),
        ("context_length", "str", "64", "context_length: expected an integer, got '64'"),
        ("context_length", "bool", True, "context_length: expected an integer, got True"),
        ("attention.head_count", "arr[u32]", [4, 2], "the same one for each of the 2 layers, got"),
        ("attention.head_count", "arr[u32]", [4, 4, 4], "for each of the 2 layers, got an array"),
        ("attention.head_count", "arr[u32]", [], "for each of the 2 layers, got an array of 0"),
        ("attention.head_count", "arr[f32]", [4.0, 4.0], "an integer, .* got an array of 2"),
        ("attention.head_count", "arr[str]", ["4", "4"], "an integer, got an array of 2 strings"),
        ("rope.dimension_count", "u32", 4, "expected the head_dim, 8, got 4"),
        ("attention.value_length", "u32", 4, "expected the head_dim, 8, got 4"),
        ("vocab_size", "str", "40", "vocab_size: expected an integer, got '40'"),
    ],
)
def test_keys_that_are_refused(tmp_path, key, kind, value, message):
    path = write_model(tmp_path / "m.gguf", {f"llama.{key}": (kind, value)})
    with pytest.raises(ConfigError, match=f"^{path}: .*{message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["block_count"], "missing llama.block_count$"),
        (["attention.layer_norm_rms_epsilon"], "missing llama.attention.layer_norm_rms_epsilon"),
        (["context_length", "embedding_length"], "llama.context_length, llama.embedding_length"),
    ],
)
def test_keys_that_are_missing(tmp_path, missing, message):
    path = write_model(tmp_path / "m.gguf", {f"llama.{key}": None for key in missing})
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(path)


def test_the_vocabulary_is_as_large_as_the_embedding(tmp_path):
    """llama.cpp goes by the tokens; what vocab_size says counts where there are fewer.

    Without vocab_size, rows after those of the tokens are padding.
    """
    no_size = {"llama.vocab_size": None}
    assert open_checkpoint(write_model(tmp_path / "m.gguf", no_size)).config.vocab_size == 40
    wrong = {"llama.vocab_size": ("u32", 41)}
    assert open_checkpoint(write_model(tmp_path / "m.gguf", wrong)).config.vocab_size == 40
    fewer = {"tokenizer.ggml.tokens": ("arr[str]", ["a", "b"])}
    assert open_checkpoint(write_model(tmp_path / "m.gguf", fewer)).config.vocab_size == 40
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight \(expected \[2, 32\]"):
        open_checkpoint(write_model(tmp_path / "m.gguf", no_size | fewer))
    most = {"tokenizer.ggml.tokens": ("arr[str]", list(map(str, range(39))))}
    padded = open_checkpoint(write_model(tmp_path / "m.gguf", no_size | most))
    assert padded.config.vocab_size == 39
    assert padded.tensors["model.embed_tokens.weight"].padding == 1
    more = {"tokenizer.ggml.tokens": ("arr[str]", list(map(str, range(41))))}
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight \(expected \[41, 32\]"):
        open_checkpoint(write_model(tmp_path / "m.gguf", no_size | more))
    without = no_size | {"tokenizer.ggml.tokens": None}
    with pytest.raises(ConfigError, match=r"missing llama.vocab_size"):
        open_checkpoint(write_model(tmp_path / "m.gguf", without))


@pytest.mark.parametrize("value", [("u32", 5), ("str", "abc"), ("arr[i32]", [1, 2])])
def test_tokens_that_are_no_strings(tmp_path, value):
    path = write_model(tmp_path / "m.gguf", {"tokenizer.ggml.tokens": value})
    with pytest.raises(ConfigError, match=r"ggml.tokens: expected an array of strings, got"):
        open_checkpoint(path)


IDS = ("bos", "eos", "eot", "eom", "padding")


@pytest.mark.parametrize("none", [("u32", 2**32 - 1), ("i32", -1), ("u32", 40), ("u64", 2**63)])
def test_ids_that_the_vocabulary_does_not_have(tmp_path, none):
    keys = {f"tokenizer.ggml.{name}_token_id": none for name in IDS}
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", keys))
    config = checkpoint.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)
    assert checkpoint.generation_config == {}


@pytest.mark.parametrize("value", [("str", "x"), ("f32", 1.0), ("bool", True), ("arr[u32]", [1])])
@pytest.mark.parametrize("name", IDS)
def test_ids_that_are_no_integers(tmp_path, name, value):
    path = write_model(tmp_path / "m.gguf", {f"tokenizer.ggml.{name}_token_id": value})
    with pytest.raises(ConfigError, match=f"{name}_token_id: expected an integer, got "):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("ids", "more", "ends"),
    [
        ({"eos": 3}, None, [3]),
        ({"eos": 3, "eot": 5, "eom": 4}, None, [3, 5, 4]),
        ({"eos": 3, "eot": 3, "eom": 99}, None, [3]),
        ({"eot": 39}, None, [39]),
        ({"eos": 3}, [7, 3, 40, -1, 8], [3, 7, 8]),
    ],
)
def test_ends_of_a_text(tmp_path, ids, more, ends):
    keys = {f"tokenizer.ggml.{name}_token_id": ("u32", i) for name, i in ids.items()}
    if more is not None:
        keys["tokenizer.ggml.eos_token_ids"] = "arr[i32]", more
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", keys))
    assert checkpoint.generation_config == {"eos_token_id": ends}
    assert checkpoint.config.eos_token_id == ids.get("eos")


# By llama.cpp's src/llama-vocab.cpp, which collects the tokens that end a generation.
@pytest.mark.parametrize(
    ("tokens", "ids", "ends"),
    [
        ({5: "<|eot_id|>", 9: "<|eom_id|>", 7: "<|end_of_text|>"}, {"eos": 7}, [7, 5, 9]),
        ({5: "<|im_end|>", 3: "<|endoftext|>"}, {}, [3, 5]),
        ({2: "</s>", 30: "<|im_end|>"}, {"eos": 2}, [2, 30]),
        ({4: "<｜end▁of▁sentence｜>", 6: "<|EOT|>"}, {}, [4]),  # noqa: RUF001
        ({4: "<|fim_pad|>", 5: "<|file_sep|>", 6: "<|repo_name|>", 7: "<PRE>"}, {}, [4, 5, 6]),
        ({}, {"eos": 3, "fim_pad": 8, "fim_rep": 9, "fim_sep": 10}, [3, 8, 9, 10]),
        ({4: "<|end|>", 5: "<|return|>"}, {}, [4, 5]),
        ({4: "<|end|>", 5: "<|return|>", 6: "<|call|>"}, {}, [5, 6]),
        ({4: "<|end|>", 5: "<|flush|>", 6: "<|calls|>"}, {}, [5, 6]),
        ({4: "<|eot_id|>", 6: "<|eot_id|>"}, {}, [6]),
        ({4: "<|eot_id|> ", 5: " <|eot_id|>", 6: "<|EOT_ID|>"}, {"eos": 3}, [3]),
        ({4: b"a\x0a\0\0\0\0\0\0\0<|eot_id|>", 5: b"\xff"}, {"eos": 3}, [3]),
        ({3: "<|eot_id|>", 4: b"a\x0a\0\0\0\0\0\0\0<|eot_id|>"}, {}, [3]),
    ],
)
def test_ends_that_are_known_by_their_spelling(tmp_path, tokens, ids, ends):
    keys = {f"tokenizer.ggml.{name}_token_id": ("u32", i) for name, i in ids.items()}
    words = [tokens.get(i, str(i)) for i in range(40)]
    keys["tokenizer.ggml.tokens"] = "arr[str]", words
    checkpoint = open_checkpoint(write_model(tmp_path / "m.gguf", keys))
    assert checkpoint.generation_config == {"eos_token_id": ends}
    assert checkpoint.config.eos_token_id == ids.get("eos")


def test_ends_that_are_no_integers(tmp_path):
    path = write_model(tmp_path / "m.gguf", {"tokenizer.ggml.eos_token_ids": ("arr[str]", ["a"])})
    with pytest.raises(ConfigError, match="eos_token_ids: expected an array of integers, got"):
        open_checkpoint(path)
