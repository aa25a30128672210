"""GGUF: bits, orders, configs, and what is refused."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import tiny

from llama_layers import CheckpointError, ConfigError, RopeScaling, load
from llama_layers.checkpoint import open_checkpoint


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED, tiny.BIASED, tiny.QWEN2])
def test_plain_numbers(tmp_path, config, heads):
    config = replace(config, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    weights = tiny.arrays(config)
    path = tiny.write_gguf(
        tmp_path / "m.gguf",
        weights,
        config,
        architecture=config.model_type,
        keys={"attention.key_length": 8, "attention.value_length": 8},
    )
    model = load(path)
    assert model.config == config
    tiny.assert_holds(model, weights)


def test_half_precision_stays(tmp_path):
    weights = tiny.arrays(dtype=np.float16)
    tiny.assert_holds(load(tiny.write_gguf(tmp_path / "m.gguf", weights)), weights)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_block_formats(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    config = replace(tiny.CONFIG, intermediate_size=64)  # blocks are 32 numbers
    weights = tiny.arrays(config)
    path = tiny.write_gguf(tmp_path / "m.gguf", weights, config, quantised=kind)
    # A row is quantised by itself, so the order of rows changes nothing in it.
    expected = {
        name: gguf.dequantize(gguf.quantize(a, kind), kind) if a.ndim == 2 else a
        for name, a in weights.items()
    }
    model = load(path, dtype="float32")
    tiny.assert_holds(model, expected)
    info = open_checkpoint(path).tensors["lm_head.weight"]
    assert info.shape == (40, 32)
    assert info.dtype == {"BF16": "bfloat16"}.get(kind.name, kind.name)
    assert info.stored_name == "output.weight"


def test_numbers_stay_in_the_file(tmp_path):
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays()))
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.shares_memory(checkpoint.read(name), checkpoint.read(name))


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-8, 3e-6, 0.00012345])
def test_numbers_are_the_decimals_that_were_rounded_to_float32(tmp_path, eps):
    keys = {"attention.layer_norm_rms_epsilon": eps, "rope.freq_base": 1000000.0}
    config = load(tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), keys=keys)).config
    assert (config.rms_norm_eps, config.rope_theta) == (eps, 1000000.0)


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


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", factor=4.0)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
            RopeScaling("linear", factor=2.5),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 8.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.finetuned": True,
            },
            RopeScaling("yarn", factor=8.0, original_max_position_embeddings=32),
        ),
    ],
)
def test_rope_scaling(tmp_path, keys, expected):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), keys=keys)
    assert load(path).config.rope_scaling == expected


def llama3_divisors(theta, dim, factor, low=1.0, high=4.0, context=8192):
    """What llama.cpp writes for Llama 3.1: in float32, by wavelength."""
    result = []
    for i in range(0, dim, 2):
        frequency = np.float32(1) / np.float32(theta) ** np.float32(i / dim)
        wavelength = np.float32(2 * np.pi) / frequency
        if wavelength < context / high:
            result.append(1.0)
        elif wavelength > context / low:
            result.append(factor)
        else:
            smooth = (np.float32(context) / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, np.float32)


LLAMA3 = replace(
    tiny.CONFIG,
    head_dim=64,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        "llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)


def test_llama3_scaling(tmp_path):
    divisors = llama3_divisors(500000.0, 64, 32.0)
    assert len(set(divisors)) > 3  # kept, blended and divided frequencies are all there
    path = tiny.write_gguf(
        tmp_path / "m.gguf",
        tiny.arrays(LLAMA3),
        LLAMA3,
        keys={"attention.key_length": 64},
        rope_freqs=divisors,
    )
    assert load(path).config == LLAMA3


@pytest.mark.parametrize(
    ("divisors", "message"),
    [
        (llama3_divisors(500000.0, 64, 32.0, high=2.0), "high_freq_factor 4 .* got others"),
        (np.arange(1, 33), "got others"),
        (np.ones(31), "expected 32 positive numbers"),
        (np.zeros(32), "expected 32 positive numbers"),
    ],
)
def test_other_factors_are_refused(tmp_path, divisors, message):
    path = tiny.write_gguf(
        tmp_path / "m.gguf",
        tiny.arrays(LLAMA3),
        LLAMA3,
        keys={"attention.key_length": 64},
        rope_freqs=divisors,
    )
    with pytest.raises(ConfigError, match=f"m.gguf: rope_freqs.weight: .*{message}"):
        load(path)


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2moe"])
def test_another_architecture(tmp_path, architecture):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), architecture=architecture)
    with pytest.raises(
        CheckpointError,
        match=f"m.gguf: expected one of the architectures llama, qwen2, got '{architecture}'",
    ):
        load(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, "unknown llama.expert_count = 8, which may change the maths"),
        ({"attention.sliding_window": 4096}, "unknown llama.attention.sliding_window = 4096"),
        ({"block_count": None}, "missing llama.block_count"),
        ({"attention.layer_norm_rms_epsilon": None}, "missing llama.*rms_epsilon"),
        ({"vocab_size": None}, "missing llama.vocab_size"),
        ({"rope.dimension_count": 4}, "rope.dimension_count: expected the head_dim, 8, got 4"),
        ({"attention.value_length": 4}, "value_length: expected the head_dim, 8, got 4"),
        ({"attention.head_count": [4, 4]}, r"expected a positive integer, got \[4, 4\]"),
        ({"rope.scaling.type": "longrope"}, "expected none, linear or yarn, got 'longrope'"),
    ],
)
def test_configs_that_are_refused(tmp_path, keys, message):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), keys=keys)
    with pytest.raises(ConfigError, match=f"m.gguf: .*{message}"):
        load(path)


def test_tensors_that_are_missing(tmp_path):
    weights = tiny.arrays()
    del weights["model.layers.1.mlp.up_proj.weight"]
    path = tiny.write_gguf(tmp_path / "m.gguf", weights)
    with pytest.raises(CheckpointError, match=r"1 missing: model.layers.1.mlp.up_proj.weight"):
        load(path)


def test_one_of_several_parts(tmp_path):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), metadata={"split.count": 3})
    with pytest.raises(CheckpointError, match="is one of 3 parts; merge them"):
        load(path)


def test_integers_are_refused(tmp_path):
    weights = tiny.arrays()
    weights["model.norm.weight"] = np.arange(32, dtype=np.int8)
    with pytest.raises(CheckpointError, match="I8"):
        load(tiny.write_gguf(tmp_path / "m.gguf", weights))


def test_truncated_anywhere(tmp_path):
    path = tiny.write_gguf(
        tmp_path / "m.gguf", tiny.arrays(), metadata={"tokenizer.ggml.tokens": ["a", "b"]}
    )
    content = path.read_bytes()
    header = content.index(b"token_embd")
    for keep in [0, 3, 10, 23, *range(24, header + 200, 37), len(content) // 2, len(content) - 40]:
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: expected a GGUF file")):
            load(path)


def test_overlapping_tensors(tmp_path):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    content = bytearray(path.read_bytes())
    # name, number of axes, two sizes, type, offset
    place = content.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 16 + 4
    content[place : place + 8] = (64).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="overlaps"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"x" * 99]
)
def test_garbage(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m.gguf: expected a GGUF file"):
        load(path)


def test_the_package_is_missing(tmp_path, monkeypatch):
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the package gguf: pip install gguf"):
        load(path)
