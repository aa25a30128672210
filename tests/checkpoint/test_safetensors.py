"""Safetensors checkpoints: what is read bit for bit, and what is refused with which words."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import CheckpointError, ConfigError, load
from llama_layers.checkpoint import open_checkpoint
from tests.support import tiny


def refused(path, message):
    return pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*" + message)


@pytest.fixture
def directory(tmp_path):
    return tiny.write_single(tmp_path / "model", tiny.arrays())


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED, tiny.QWEN2, tiny.BIASED])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_bits_are_kept(tmp_path, config, dtype):
    import ml_dtypes  # noqa: F401  # numpy then knows the name bfloat16

    weights = tiny.arrays(config, np.dtype(dtype))
    tiny.assert_holds(load(tiny.write_single(tmp_path, weights, config)), weights)


def test_shards_are_the_same_as_one_file(tmp_path):
    weights = tiny.arrays()
    tiny.assert_holds(load(tiny.write_sharded(tmp_path, weights)), weights)


def test_a_file_finds_its_config_beside_it(directory):
    model = load(directory / "model.safetensors")
    tiny.assert_holds(model, tiny.arrays())


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3), (6, 2)])
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED, tiny.BIASED])
def test_meta_is_the_same_as_hugging_face(tmp_path, config, heads):
    config = replace(config, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    weights = tiny.arrays(config)
    path = tiny.write_single(tmp_path, tiny.meta(weights, config), config)
    tiny.assert_holds(load(path), weights)
    assert open_checkpoint(path).format == "Hugging Face directory, Meta names"


def test_a_tied_head_is_passed_over_if_it_is_the_embedding(tmp_path):
    weights = tiny.arrays(tiny.TIED)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}
    path = tiny.write_single(tmp_path, weights | head, tiny.TIED)
    tiny.assert_holds(load(path), weights)
    head["lm_head.weight"][3, 5] += 1
    tiny.write_single(tmp_path, weights | head, tiny.TIED)
    with refused(path, "lm_head.weight differs from model.embed_tokens.weight.*tie_word"):
        load(path)


def test_unaligned_numbers_are_read(tmp_path):
    weights = tiny.arrays()
    tiny.write_single(tmp_path, weights)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes(
        (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
    )
    model = load(tmp_path)
    tiny.assert_holds(model, weights)
    assert model.weights.embed_tokens.flags.aligned


def test_missing_tensors(tmp_path):
    weights = tiny.arrays()
    for name in list(weights)[1:7]:
        del weights[name]
    with refused(
        tmp_path,
        "do not match the config: 6 missing: model.layers.0.input_layernorm.weight, "
        "model.layers.0.self_attn.q_proj.weight, .*, and 2 more",
    ):
        load(tiny.write_single(tmp_path, weights))


def test_a_layer_too_many_is_extra(tmp_path):
    weights = tiny.arrays(replace(tiny.CONFIG, num_hidden_layers=3))
    with refused(tmp_path, "9 unexpected: model.layers.2.*and 5 more"):
        load(tiny.write_single(tmp_path, weights))


def test_a_bias_that_the_config_does_not_know_is_extra(tmp_path):
    weights = tiny.arrays(tiny.QWEN2)
    with refused(tmp_path, "6 unexpected: model.layers.0.self_attn.[kqv]_proj.bias"):
        load(tiny.write_single(tmp_path, weights))


def test_misshapen_tensors(tmp_path):
    weights = tiny.arrays()
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = np.ascontiguousarray(weights[name].T)
    with refused(tmp_path, rf"1 of another shape: {name} \(expected \[32, 48\], got \[48, 32\]\)"):
        load(tiny.write_single(tmp_path, weights))


def test_config_and_tensors_that_disagree(directory):
    tiny.write_config(directory, num_key_value_heads=4)
    with refused(directory, r"4 of another shape: .*k_proj.weight \(expected \[32, 32\], got \[16"):
        load(directory)


def test_tensors_that_hold_no_weights(tmp_path):
    weights = tiny.arrays()
    weights["model.norm.weight"] = np.arange(32, dtype=np.int8)
    with refused(tmp_path, r"model.norm.weight: quantised weights \(I8\) are not supported"):
        load(tiny.write_single(tmp_path, weights))
    weights["model.norm.weight"] = np.arange(32)
    with refused(tmp_path, "model.norm.weight: expected one of the dtypes F16, .*, got I64"):
        load(tiny.write_single(tmp_path, weights))


def test_queries_and_keys_of_different_dtypes(tmp_path):
    weights = tiny.arrays()
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].astype(np.float16)
    tiny.write_single(tmp_path, weights)
    with refused(tmp_path, f"{name}.* are of different dtypes, float32, float16, float32"):
        load(tmp_path)
    assert load(tmp_path, layers=[0]).weights.layers[0].self_attn.qkv.fused.dtype == np.float32
    fused = load(tmp_path, dtype="float32").weights.layers[1].self_attn.qkv
    assert np.array_equal(fused.k, weights[name].astype(np.float32))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with refused(file, "expected a safetensors file"):
        load(directory)


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [([0, 8], [4, 12], 12), ([0, 8], [12, 20], 20), ([0, 8], [8, 16], 20)],
    ids=["overlap", "hole", "tail"],
)
def test_tensors_that_do_not_fill_the_file(tmp_path, first, second, size):
    tiny.write_config(tmp_path)
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": offsets}
        for name, offsets in (("a", first), ("b", second))
    }
    tiny.write_raw(tmp_path / "model.safetensors", header, bytes(size))
    with refused(tmp_path / "model.safetensors", "expected a safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize("length", [4_000_001, 100_000_001, 2**32 - 1])
def test_a_header_that_is_too_long(tmp_path, length):
    tiny.write_config(tmp_path)
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:  # a sparse file, which takes no room
        stream.write(length.to_bytes(8, "little") + b"{")
        stream.truncate(min(length, 1 << 27) + 100)
    with refused(file, f"expected a safetensors file: a header of {length} bytes is too large"):
        load(tmp_path)


def test_a_tensor_that_the_header_names_twice(directory):
    """The format disallows duplicate keys; the last one would win."""
    file = directory / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = "model.layers.0.mlp.up_proj.weight"
    other = header["model.layers.0.mlp.gate_proj.weight"]
    twice = f'{{"{name}":{json.dumps(other)},'.encode() + content[9:end]
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + content[end:])
    with refused(file, f"expected a safetensors file: '{name}' appears twice"):
        load(directory)


def test_a_name_that_would_move_the_cursor(tmp_path):
    weights = tiny.arrays() | {"\x1b[2J\n": np.ones(1, np.float32)}
    with refused(tmp_path, r"1 unexpected: \\x1b\[2J\\n$"):
        load(tiny.write_single(tmp_path, weights))


@pytest.mark.parametrize("shape", [[], [0], [0, 32], [2**40, 0]])
def test_tensors_of_no_rows(tmp_path, shape):
    tiny.write_config(tmp_path)
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0 if 0 in shape else 4]}
    names = [*tiny.arrays(), "model.rotary_emb.inv_freq"]
    header = dict.fromkeys(names, tensor) if 0 in shape else {names[-1]: tensor}
    tiny.write_raw(tmp_path / "model.safetensors", header, bytes(tensor["data_offsets"][1]))
    with refused(tmp_path, "do not match the config: .*(21 missing|21 of another shape)"):
        load(tmp_path)


def test_a_file_that_never_ends(tmp_path):
    tiny.write_config(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with refused(tmp_path / "model.safetensors", "expected a safetensors file: not a regular file"):
        load(tmp_path / "model.safetensors")


def test_a_header_that_is_no_utf8(tmp_path):
    tiny.write_config(tmp_path)
    tiny.write_raw(tmp_path / "model.safetensors", b'{"\xff\xfe": {}}')
    with refused(tmp_path / "model.safetensors", "expected a safetensors file.*(utf|UTF)"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"\x00" * 64])
def test_garbage(tmp_path, content):
    tiny.write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with refused(tmp_path / "model.safetensors", "expected a safetensors file"):
        load(tmp_path)


def test_no_config(directory):
    (directory / "config.json").unlink()
    with refused(directory, "expected config.json beside model.safetensors"):
        load(directory)


def test_a_config_that_is_incomplete(directory):
    (directory / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: .*missing vocab_size"):
        load(directory)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with refused(tmp_path / "model.bin", r"expected a Hugging Face directory, a \.safetensors"):
        load(tmp_path / "model.bin")


def test_an_unknown_name():
    with pytest.raises(
        CheckpointError,
        match=r"llama-5: no such file or directory, not a known model \(smollm2-135m\), and not ",
    ):
        load("llama-5")
