"""Tensors under other names than a model's: ignored, or refused with what they are."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import convert, expected_tensors, open_checkpoint
from llama_layers.checkpoint.stored_numbers import equal_bytes
from tests.support import tiny

# Buffers of transformers' and others' modules, which no class of transformers 5 reads.
INERT = (
    "rope.freqs",
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached",
    "model.layers.1.self_attn.masked_bias",
    "model.layers.1.self_attn.k_scale",
    "model.layers.1.self_attn.v_scale",
    "model.layers.1.self_attn.k_proj.k_scale",
)
CONFIGS = [tiny.CONFIG, tiny.TIED, tiny.QWEN2, tiny.BIASED]


def refused(path, message):
    return pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*" + message)


@pytest.mark.parametrize("name", INERT)
def test_what_changes_no_number_is_ignored(tmp_path, name):
    weights = tiny.arrays()
    for dtype in (np.float32, np.int64, ml_dtypes.float8_e4m3fn):
        path = tiny.write_single(tmp_path, weights | {name: np.ones((1, 3), dtype)})
        tiny.assert_holds(load(path), weights)
        assert open_checkpoint(path).ignored_tensors == (name,)


def test_a_tied_head_is_ignored(tmp_path):
    weights = tiny.arrays(tiny.TIED)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"]}
    path = tiny.write_single(tmp_path, weights | head, tiny.TIED)
    assert open_checkpoint(path).ignored_tensors == ("lm_head.weight",)
    tiny.write_single(tmp_path, tiny.meta(weights | head, tiny.TIED), tiny.TIED)
    assert open_checkpoint(path).ignored_tensors == ("output.weight",)
    tiny.write_single(tmp_path, weights, tiny.TIED)
    assert open_checkpoint(path).ignored_tensors == ()


@pytest.mark.parametrize("place", range(10))
def test_bytes_are_compared_to_the_end(place):
    first = np.zeros(10, np.uint8)
    second = first.copy()
    assert equal_bytes(first, second, step=4)
    second[place] = 1
    assert not equal_bytes(first, second, step=4)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",  # Qwen3
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.mtp.layers.0.weight",
        "model.layers.0.self_attn.rotary_emb.weight.inv_freq",
        "inv_freq",
    ],
)
def test_what_another_model_reads_is_refused(tmp_path, name):
    weights = tiny.arrays() | {name: np.ones(32, np.float32)}
    with refused(tmp_path, f"1 unexpected: {name}$"):
        load(tiny.write_single(tmp_path, weights))


PREFIXES = {
    "language_model.": lambda name: "language_model." + name,
    "_orig_mod.": lambda name: "_orig_mod." + name,
    "module.": lambda name: "module." + name,
    "_orig_mod.module.": lambda name: "_orig_mod.module." + name,
    "base_model.model.": lambda name: "base_model.model." + name,
    "model.language_model.": lambda name: name.replace("model.", "model.language_model."),
    "language_model.model.": lambda name: name.replace("model.", "language_model.model."),
    "model.": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_that_differ_by_a_prefix(tmp_path, prefix, config):
    renamed = PREFIXES[prefix]
    weights = {renamed(name): array for name, array in tiny.arrays(config).items()}
    weights["vision_tower.norm.weight"] = np.ones(3, np.float32)
    called = re.escape(renamed("model.embed_tokens.weight"))
    with refused(
        tmp_path,
        rf"do not match the config: the names (contain|carry the prefix|lack the prefix) "
        rf"'.*{re.escape(prefix.split('.')[0])}\..*' .*\({called} for model.embed_tokens.weight\): "
        rf"rename the tensors, or pass them renamed to Llama.from_state_dict$",
    ):
        load(tiny.write_single(tmp_path, weights, config))


@pytest.mark.parametrize(
    ("family", "table"),
    [("phi3", "model.embed_tokens"), ("glm4", "model.embed_tokens"), ("exaone", "transformer.wte")],
)
def test_a_prefix_of_names_that_files_of_a_family_have(tmp_path, family, table):
    """Fused tensors and names of a family's own are no other difference."""
    config = replace(tiny.CONFIG, model_type=family)
    (tmp_path / "plain").mkdir()
    path = tiny.write_single(tmp_path / "plain", tiny.arrays(config), config)
    stored = load_file(convert(path, tmp_path / "out") / "model.safetensors")
    assert f"{table}.weight" in stored
    weights = {f"language_model.{name}": array for name, array in stored.items()}
    with refused(
        tmp_path, rf"carry the prefix 'language_model.' \(language_model.{table}.weight f"
    ):
        load(tiny.write_single(tmp_path, weights, config))


def test_fused_tensors_are_missing_as_such(tmp_path):
    config = replace(tiny.CONFIG, model_type="phi3")
    stored = tiny.fused(tiny.arrays(config))
    del stored["model.layers.1.self_attn.qkv_proj.weight"]
    with refused(tmp_path, "config: 1 missing: model.layers.1.self_attn.qkv_proj.weight$"):
        load(tiny.write_single(tmp_path, stored, config))


def test_fused_tensors_of_another_family(tmp_path):
    stored = tiny.fused(tiny.arrays(), ["self_attn.qkv_proj"])
    with refused(
        tmp_path,
        r"model.layers.0.self_attn.qkv_proj.weight seems to hold the rows of .*\.v_proj.weight, "
        r"which files of llama have apart: split it",
    ):
        load(tiny.write_single(tmp_path, stored))


def test_a_base_model_has_no_head(tmp_path):
    weights = {name.removeprefix("model."): array for name, array in tiny.arrays().items()}
    del weights["lm_head.weight"]
    with refused(tmp_path, "lack the prefix 'model.' .*, and lm_head.weight is missing: rename"):
        load(tiny.write_single(tmp_path, weights))


def test_names_of_wrapped_modules(tmp_path):
    weights = {re.sub(r"(s\.\d)\.", r"\1._orig_mod.", n): a for n, a in tiny.arrays().items()}
    assert "model.layers.1._orig_mod.mlp.up_proj.weight" in weights
    with refused(tmp_path, "contain '_orig_mod.' .model.layers.0._orig_mod.input_layernorm.weig"):
        load(tiny.write_single(tmp_path, weights))


def test_one_name_of_meta_among_hugging_faces(tmp_path):
    theirs = tiny.meta(tiny.arrays())
    pairs = dict(zip(tiny.arrays(), theirs, strict=True))
    for name, meta_name in pairs.items():
        weights = tiny.arrays()
        weights[meta_name] = weights.pop(name)
        message = "expected Hugging Face's names or Meta's, got .* order the rows of queries"
        if name == "model.norm.weight":  # of which no order depends
            message = "1 missing: model.norm.weight; 1 unexpected: norm.weight"
        with refused(tmp_path, message):
            load(tiny.write_single(tmp_path, weights))


def test_one_name_of_hugging_face_among_metas(tmp_path):
    ours = tiny.arrays()
    for name, meta_name in zip(ours, tiny.meta(ours), strict=True):
        for replaced in (True, False):
            weights = tiny.meta(ours)
            weights[name] = weights.pop(meta_name) if replaced else weights[meta_name]
            with refused(tmp_path, f"names or Meta's, got {name} and "):
                load(tiny.write_single(tmp_path, weights))


# The tensors that stand for one matrix, by the suffix and dtype that its format publishes.
QUANTISED = {
    "bitsandbytes": {"weight": np.uint8, "weight.absmax": np.float32, "weight.quant_map": "f4"},
    "GPTQ": {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32},
    "AWQ or GPTQ": {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16},
    "compressed-tensors": {"weight_packed": np.int32, "weight_scale": np.float16},
    "fp8 with a scale for each block": {
        "weight": ml_dtypes.float8_e4m3fn, "weight_scale_inv": np.float32,
    },
    "NVIDIA ModelOpt": {
        "weight": np.uint8, "weight_scale": ml_dtypes.float8_e4m3fn, "weight_scale_2": np.float32,
    },
    "8-bit weights with scales": {"weight": np.int8, "weight_scale": np.float32},
    "HQQ": {"W_q": np.uint8, "zero": np.float16, "scale": np.float16},
    "MLX": {"weight": np.uint32, "scales": np.float16, "biases": np.float16},
    "F8_E5M2": {"weight": ml_dtypes.float8_e5m2},
    "F8_E4M3": {"weight": ml_dtypes.float8_e4m3fn},
    "I8": {"weight": np.int8},
}  # fmt: skip


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights(tmp_path, method):
    weights = {}
    for name, array in tiny.arrays().items():
        if array.ndim == 2 and "layers" in name:
            stem = name.removesuffix("weight")
            weights |= {stem + end: array.astype(d) for end, d in QUANTISED[method].items()}
        else:
            weights[name] = array
    with refused(
        tmp_path,
        rf"model.layers.0.*: quantised weights \({method}\) are not supported; use the unquantised "
        rf"model they were made from or a GGUF file of it$",
    ):
        load(tiny.write_single(tmp_path, weights))


def test_an_adapter(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tiny.write_single(tmp_path, {name: np.ones((4, 32), np.float32)})
    with refused(tmp_path, f"{name}: a LoRA adapter, which is not a whole model: merge it"):
        load(tmp_path)


def written(directory, weights, config, convention, shards):
    if convention == "gguf":
        architecture = "qwen2" if config.model_type == "qwen2" else "llama"
        return tiny.write_gguf(directory / "m.gguf", weights, config, architecture=architecture)
    if shards == 1:
        return tiny.write_single(directory, weights, config)
    return tiny.write_sharded(directory, weights, config, shards)


@settings(max_examples=40, deadline=None)
@given(
    config=st.sampled_from(CONFIGS[:3]),
    convention=st.sampled_from(["hugging face", "meta", "gguf"]),
    shards=st.integers(1, 4),
    extras=st.sets(st.sampled_from(INERT)),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 99),
)
def test_a_model_under_any_names_in_any_files(config, convention, shards, extras, dtype, seed):
    weights = tiny.arrays(config, dtype, seed)
    stored = tiny.meta(weights, config) if convention == "meta" else dict(weights)
    if convention != "gguf":
        stored |= {name: np.full(3, np.nan, dtype) for name in extras}
    with tempfile.TemporaryDirectory() as directory:
        path = written(Path(directory), stored, config, convention, shards)
        tiny.assert_holds(load(path), weights)


@settings(max_examples=60, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    meta=st.booleans(),
    shards=st.integers(1, 4),
    damage=st.sampled_from(["drop", "rename", "reshape", "repeat"]),
    data=st.data(),
)
def test_one_damaged_tensor_is_named(config, meta, shards, damage, data):
    weights = tiny.arrays(config)
    stored = tiny.meta(weights, config) if meta else dict(weights)
    index = data.draw(st.integers(0, len(stored) - 1))
    name, stored_name = list(expected_tensors(config))[index], list(stored)[index]
    array = stored.pop(stored_name)
    if damage == "rename":
        stored[stored_name + "s"] = array
    elif damage == "reshape":
        stored[stored_name] = np.concatenate([array, array])
    elif damage == "repeat":
        stored[stored_name] = array
    with tempfile.TemporaryDirectory() as directory:
        path = written(Path(directory), stored, config, "", shards + (damage == "repeat"))
        if damage == "repeat":
            held = {file: load_file(file) for file in path.glob("*.safetensors")}
            file = next(file for file in held if stored_name not in held[file])
            save_file(held[file] | {stored_name: array}, file)
        with refused(path, f"({re.escape(name)}|{re.escape(stored_name)})"):
            load(path)
