"""Models in GGUF files: bits, orders, and tensors that are refused."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import open_checkpoint
from llama_layers.checkpoint.extras import require, require_installed
from tests.support import gguf_files, tiny

MODEL = gguf_files.MODEL


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


def test_tensors_that_are_missing(tmp_path):
    weights = tiny.arrays()
    del weights["model.layers.1.mlp.up_proj.weight"]
    path = tiny.write_gguf(tmp_path / "m.gguf", weights)
    with pytest.raises(CheckpointError, match=r"1 missing: model.layers.1.mlp.up_proj.weight"):
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


def test_numbers_need_no_package(tmp_path, monkeypatch):
    weights = tiny.arrays()
    path = tiny.write_gguf(tmp_path / "m.gguf", weights)
    monkeypatch.setitem(sys.modules, "gguf", None)
    tiny.assert_holds(load(path), weights)


def test_the_package_is_missing(tmp_path, monkeypatch):
    config = replace(tiny.CONFIG, intermediate_size=64)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(config), config, quantised=kind)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ImportError, match=r"needs the package gguf: pip install 'llama-layers\[models\]'"
    ):
        load(path)


def test_a_package_that_lacks_another_one(tmp_path, monkeypatch):
    """Then the other one is named."""
    (tmp_path / "broken_package.py").write_text("import a_missing_one")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_missing_one'"):
        require("broken_package", "this")


def test_a_package_is_known_to_be_missing_before_it_is_used(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match=r"^this needs the package a_missing_one: pip install"):
        require_installed("a_missing_one", "this")
    require_installed("gguf", "this")
    (tmp_path / "slow_package.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    require_installed("slow_package", "this")  # is not imported


def test_a_name_that_is_not_of_gguf(tmp_path):
    """Not even one that a model's tensor has elsewhere: it would stand for another one."""
    content = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays()).read_bytes()
    for name in (b"model.norm.weight", b"output_morm.weight"):
        path = tmp_path / "n.gguf"
        path.write_bytes(content.replace(b"output_norm.weight", name.ljust(18, b"x")))
        with pytest.raises(CheckpointError, match=rf"{name.decode()}x?: no llama has a tensor of"):
            load(path)


def test_two_names_for_a_tensor(tmp_path):
    tensors = gguf_files.llama() | {"model.norm.weight": np.ones(32, np.float32)}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_files.encode(MODEL, tensors).content)
    with pytest.raises(CheckpointError, match=r"model.norm.weight: no llama has a tensor"):
        load(path)


def test_frequencies_of_old_converters_are_left_out(tmp_path):
    tensors = gguf_files.llama()
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_files.encode(MODEL, tensors).content)
    names = set(open_checkpoint(path).tensors)
    tensors |= {f"blk.{i}.attn_rot_embd.weight": np.ones(4, np.float32) for i in range(2)}
    path.write_bytes(gguf_files.encode(MODEL, tensors).content)
    assert set(open_checkpoint(path).tensors) == names


@pytest.mark.parametrize("name", ["output_norm.weight", "rope_freqs.weight"])
def test_vectors_in_blocks_are_refused(tmp_path, name):
    """As llama.cpp refuses to compute with them."""
    tensors = gguf_files.llama() | {"rope_freqs.weight": np.ones(32, np.float32)}
    content = gguf_files.encode(MODEL, tensors).content
    place = content.index(name.encode()) + len(name) + 4 + 8  # after the number of axes and one
    content[place : place + 4] = gguf.GGMLQuantizationType.Q8_0.to_bytes(4, "little")
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: expected floats for a vector, got .*Q8_0"):
        load(path)


def test_a_vocabulary_alone_is_no_model(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_files.encode(MODEL).content)
    with pytest.raises(CheckpointError, match="got a GGUF file without tensors"):
        load(path)


def test_a_chat_template_that_is_no_text(tmp_path):
    path = tmp_path / "m.gguf"
    metadata = MODEL | {"tokenizer.chat_template": ("u32", 3)}
    path.write_bytes(gguf_files.encode(metadata, gguf_files.llama()).content)
    with pytest.raises(CheckpointError, match=r"chat.template.* expected a \w+, got 3"):
        load(path)
