"""Which files of a directory hold the weights, and what is said where none does."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import open_checkpoint
from tests.support import tiny


def refused(path, message):
    return pytest.raises(CheckpointError, match=re.escape(str(path)) + ".*" + message)


@pytest.fixture
def sharded(tmp_path):
    return tiny.write_sharded(tmp_path, tiny.arrays())


def weight_map(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def test_the_files_that_a_model_is_read_from(sharded):
    (sharded / "additional_chat_templates").mkdir()
    template = sharded / "additional_chat_templates" / "tool_use.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    found = {file for file in open_checkpoint(sharded).files() if file.is_file()}
    assert found == {file for file in sharded.rglob("*") if file.is_file()}
    assert sharded / "tokenizer.json" in open_checkpoint(sharded).files()


def test_a_shard_missing_from_disk(sharded):
    shard = "model-00002-of-00003.safetensors"
    (sharded / shard).unlink()
    with refused(sharded, f"names the shard {shard}, which is missing$"):
        load(sharded)


def test_a_shard_missing_from_the_index(sharded):
    shard = "model-00002-of-00003.safetensors"
    kept = {name: file for name, file in weight_map(sharded).items() if file != shard}
    tiny.write_index(sharded, kept)
    with refused(sharded, "missing: model.layers.0.input_layernorm.weight"):
        load(sharded)


def without_norm(names):
    return {name: shard for name, shard in names.items() if name != "model.norm.weight"}


def with_norm_elsewhere(names):
    other = next(shard for shard in names.values() if shard != names["model.norm.weight"])
    return names | {"model.norm.weight": other}


def with_more(names):
    more = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "what.ever")
    return names | dict.fromkeys(more, next(iter(names.values())))


@pytest.mark.parametrize("change", [without_norm, with_norm_elsewhere, with_more])
def test_an_index_says_which_files_alone(tmp_path, change):
    """As in transformers: tests/peers/test_state_dict.py holds these against it."""
    weights = tiny.arrays(tiny.TIED)
    tiny.write_sharded(tmp_path, weights, tiny.TIED)
    tiny.write_index(tmp_path, change(weight_map(tmp_path)))
    tiny.assert_holds(load(tmp_path), weights)


def test_a_buffer_that_only_a_shard_has(sharded):
    file = sharded / "model-00004.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tiny.save_file({name: np.zeros(4, np.float32)}, file)
    tiny.save_file({name: np.ones(4, np.float32)}, sharded / "model-00005.safetensors")
    more = {"a": file.name, "b": "model-00005.safetensors"}
    tiny.write_index(sharded, weight_map(sharded) | more)
    tiny.assert_holds(load(sharded), tiny.arrays())
    assert open_checkpoint(sharded).ignored_tensors == (name,)


def test_a_tensor_in_two_shards(sharded):
    names = weight_map(sharded)
    file = sharded / "model-00004.safetensors"
    tiny.save_file({"model.norm.weight": np.ones(32, np.float32)}, file)
    tiny.write_index(sharded, names | {"another": file.name})
    with refused(sharded, "model.norm.weight is in two shards, model-0000.*model-00004"):
        load(sharded)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/a.safetensors", 3, None])
def test_an_index_that_leads_out_of_the_directory(sharded, shard):
    tiny.write_index(sharded, weight_map(sharded) | {"model.norm.weight": shard})
    with refused(sharded, "model.norm.weight: expected the name of a file beside the index"):
        load(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "missing weight_map"),
        ('{"weight_map": {}}', "expected a weight_map of names to files, got {}"),
        ('{"weight_map": 3}', "expected a weight_map of names to files, got 3"),
        ("[" * 100_000, "expected a JSON object, got one nested too deeply"),
        (" " * 4_000_001, "expected at most 4000000 bytes, got 4000001"),
    ],
    ids=["cut", "list", "empty", "no files", "number", "deep", "long"],
)
def test_an_index_of_another_form(sharded, text, message):
    (sharded / "model.safetensors.index.json").write_text(text)
    with refused(sharded, f"index.json: {message}"):
        load(sharded)


def test_one_file_and_its_index(tmp_path):
    weights = tiny.arrays()
    tiny.write_single(tmp_path, weights)
    tiny.write_index(tmp_path, dict.fromkeys(weights, "model.safetensors"))
    tiny.assert_holds(load(tmp_path), weights)


def test_one_file_comes_before_shards(sharded):
    weights = tiny.arrays(seed=1)
    tiny.write_single(sharded, weights)
    tiny.assert_holds(load(sharded), weights)


@pytest.mark.parametrize("write", [tiny.write_single, tiny.write_sharded])
@pytest.mark.parametrize("stray", ["consolidated", "adapter_model", "model.fp16", "a"])
def test_strays_beside_the_weights(tmp_path, write, stray):
    write(tmp_path, tiny.arrays())
    (tmp_path / f"{stray}.safetensors").write_bytes(b"not read")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    tiny.assert_holds(load(tmp_path), tiny.arrays())


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-00001-of-00001.safetensors"])
def test_one_file_of_another_name(tmp_path, name):
    tiny.write_single(tmp_path, tiny.arrays())
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    tiny.assert_holds(load(tmp_path), tiny.arrays())


def test_two_files_without_an_index(tmp_path):
    tiny.write_single(tmp_path, tiny.arrays())
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with refused(tmp_path, "expected model.safetensors or .*, got a.safetensors, b.safetensors"):
        load(tmp_path)


def test_shards_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    advice = "shards of a model: load their directory, with model.safetensors.index.json in it"
    with refused(sharded, f"got model-00001-of-00003.safetensors, .*: {advice}"):
        load(sharded)
    one = sharded / "model-00002-of-00003.safetensors"
    with refused(one, f"expected a whole model, got {advice}"):
        load(one)


def test_an_empty_directory(tmp_path):
    with refused(tmp_path, "expected model.safetensors or .*index.json, got nothing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["pytorch_model.bin"], "pytorch_model.bin: PyTorch's pickle .* transformers' from_pretr"),
        (["consolidated.00.pth", "params.json"], "consolidated.00.pth: PyTorch's pickle files"),
        (["adapter_config.json", "adapter_model.safetensors"], ".*LoRA adapter.*merge_and_unload"),
        (["tiny.Q4_1.gguf"], "tiny.Q4_1.gguf: load that file itself"),
        (["tf_model.h5"], "config.json, tf_model.h5$"),
    ],
)
def test_a_directory_of_another_format(tmp_path, names, advice):
    tiny.write_config(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with refused(tmp_path, f"expected model.safetensors or .*, got {advice}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with refused(tmp_path / name, r"or a .gguf file: PyTorch's pickle files are not read"):
        load(tmp_path / name)
