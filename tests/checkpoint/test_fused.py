"""Files that hold several matrices as one, or the rows of queries and keys in another order."""

from __future__ import annotations

from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_layers import CheckpointError, Llama, load
from llama_layers.checkpoint import convert, open_checkpoint
from llama_layers.config.families import FAMILIES
from tests.support import tiny

MODULES = ("self_attn.qkv_proj", "mlp.gate_up_proj")
BOTH_BIASES = pytest.mark.parametrize("config", [tiny.CONFIG, tiny.BIASED], ids=["bare", "biased"])


@pytest.fixture
def family(monkeypatch):
    """Changes what the files of Llama hold."""

    def change(**changes):
        monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], **changes))

    return change


@BOTH_BIASES
@pytest.mark.parametrize("modules", [MODULES, MODULES[:1], MODULES[1:]])
def test_fused_tensors_of_a_directory(tmp_path, family, modules, config):
    family(fused=frozenset(modules))
    weights = tiny.arrays(config)
    stored = tiny.fused(weights, modules)
    assert len(stored) < len(weights)
    path = tiny.write_sharded(tmp_path / "source", stored, config)
    tiny.assert_holds(load(path), weights)
    assert open_checkpoint(path).format == "Hugging Face directory"
    tiny.assert_holds(Llama.from_state_dict(stored, config), weights)
    written = load_file(convert(path, tmp_path / "out") / "model.safetensors")
    assert {name: a.tobytes() for name, a in written.items()} == {
        name: a.tobytes() for name, a in stored.items()
    }


def test_fused_tensors_are_views_of_the_file(tmp_path, family):
    family(fused=frozenset(MODULES))
    model = load(tiny.write_single(tmp_path, tiny.fused(tiny.arrays())))
    for layer in model.weights.layers:
        for array in (layer.self_attn.qkv.fused, layer.mlp.gate_proj, layer.mlp.up_proj):
            assert not array.flags.owndata
            assert not array.flags.writeable


def test_parts_may_be_there_instead(tmp_path, family):
    family(fused=frozenset(MODULES))
    weights = tiny.arrays()
    tiny.assert_holds(load(tiny.write_single(tmp_path, weights)), weights)


def test_a_family_without_fused_tensors_has_none(tmp_path):
    path = tiny.write_single(tmp_path, tiny.fused(tiny.arrays(), MODULES[:1]))
    with pytest.raises(CheckpointError, match=r"missing: .*q_proj.*; 2 unexpected: .*0\.self_attn"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.1.self_attn.qkv_proj.weight": np.zeros((63, 32), np.float32)},
            r"model.layers.1.self_attn.qkv_proj.weight: expected shape \[64, 32\], the rows of "
            r"model.layers.1.self_attn.q_proj.weight, .*v_proj.weight, got \[63, 32\]$",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": np.zeros((48, 32), np.float32)},
            "model.layers.0.mlp.gate_up_proj.weight: expected no model.layers.0.mlp.up_proj.weight "
            "beside it$",
        ),
        (
            {"model.layers.1.self_attn.qkv_proj.bias": np.zeros(64, np.float32)},
            "1 unexpected: model.layers.1.self_attn.qkv_proj.bias$",
        ),
    ],
)
def test_refuses(tmp_path, family, changes, message):
    family(fused=frozenset(MODULES))
    stored = tiny.fused(tiny.arrays()) | changes
    with pytest.raises(CheckpointError, match=f"{tmp_path}: .*{message}"):
        load(tiny.write_single(tmp_path, stored))
    with pytest.raises(CheckpointError, match=f"mapping: .*{message}"):
        Llama.from_state_dict(stored, tiny.CONFIG)


@pytest.mark.parametrize("quantised", [None, gguf.GGMLQuantizationType.Q8_0])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_fused_tensors_of_gguf(tmp_path, quantised, architecture):
    """llama.cpp permutes rows of queries and keys before they are fused, if at all."""
    config = tiny.QWEN2 if architecture == "qwen2" else tiny.CONFIG
    config = replace(config, intermediate_size=64)  # whole blocks
    weights = tiny.arrays(config)
    rows = weights
    if architecture == "llama":
        rows = tiny.with_permuted_rope_rows(weights, config)
    file = tiny.write_gguf(
        tmp_path / "fused.gguf",
        tiny.fused(rows),
        config,
        architecture=architecture,
        quantised=quantised,
        permute=False,
    )
    apart = tiny.write_gguf(
        tmp_path / "apart.gguf", weights, config, architecture=architecture, quantised=quantised
    )
    stored = {info.stored_name for info in open_checkpoint(file).tensors.values()}
    assert {"blk.1.attn_qkv.weight", "blk.0.ffn_up.weight"} <= stored
    assert "blk.0.ffn_gate.weight" not in stored
    tiny.assert_holds(load(file), tiny.all_arrays(load(apart)))
    if quantised is None:
        tiny.assert_holds(load(file), weights)


@pytest.mark.parametrize("norm", ["head", "full"])
def test_norms_of_interleaved_rows(tmp_path, family, norm):
    """Their weights are channel for channel those of the rows."""
    family(interleaved=True)
    config = replace(tiny.CONFIG, qk_norm=norm)
    weights = tiny.arrays(config)
    stored = tiny.with_permuted_rope_rows(weights, config)
    for name in weights:
        for letter, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if name.endswith(f"{letter}_norm.weight"):
                heads = 1 if norm == "head" else heads
                stored[name] = tiny.permuted(weights[name], heads)
                assert not np.array_equal(stored[name], weights[name])
    path = tiny.write_single(tmp_path / "source", stored, config)
    tiny.assert_holds(load(path), weights)
    tiny.assert_holds(Llama.from_state_dict(stored, config), weights)
    written = load_file(convert(path, tmp_path / "out") / "model.safetensors")
    for name, array in stored.items():
        np.testing.assert_array_equal(written[name], array)


@BOTH_BIASES
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("fused", [(), MODULES])
def test_interleaved_rows(tmp_path, family, config, dtype, fused):
    family(interleaved=True, fused=frozenset(fused))
    weights = tiny.arrays(config, dtype)
    stored = tiny.fused(tiny.with_permuted_rope_rows(weights, config), fused)
    path = tiny.write_single(tmp_path / "source", stored, config)
    tiny.assert_holds(load(path), weights)
    assert open_checkpoint(path).format == "Hugging Face directory"
    tiny.assert_holds(Llama.from_state_dict(stored, config), weights)
    written = load_file(convert(path, tmp_path / "out") / "model.safetensors")
    assert {name: a.tobytes() for name, a in written.items()} == {
        name: a.tobytes() for name, a in stored.items()
    }
