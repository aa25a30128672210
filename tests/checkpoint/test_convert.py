"""Conversion to a Hugging Face directory."""

from __future__ import annotations

import json
import os
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import convert, open_checkpoint
from llama_layers.checkpoint.safetensors import write_safetensors
from tests.support import tiny


@pytest.fixture
def source(tmp_path):
    return tiny.write_single(tmp_path / "source", tiny.arrays())


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED, tiny.QWEN2, tiny.BIASED])
def test_all_formats_become_one(tmp_path, config):
    weights = tiny.arrays(config)
    architecture = config.model_type
    sources = [
        tiny.write_single(tmp_path / "single", weights, config),
        tiny.write_sharded(tmp_path / "sharded", weights, config),
        tiny.write_single(tmp_path / "meta", tiny.meta(weights, config), config),
        tiny.write_gguf(tmp_path / "m.gguf", weights, config, architecture=architecture),
    ]
    for source in sources:
        no_tokenizer = pytest.warns(match=r"no tokenizer is written: .*has no tokenizer$")
        with no_tokenizer if source.suffix else nullcontext():
            path = convert(source, tmp_path / f"from-{source.name}")
        found = load_file(path / "model.safetensors")
        assert found.keys() == weights.keys()
        for name, array in weights.items():
            assert found[name].tobytes() == array.tobytes(), (source, name)
        assert load(path).config == replace(config, dtype="float32")
        assert open_checkpoint(path).format == "Hugging Face directory"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(tmp_path, source, dtype):
    path = convert(source, tmp_path / "out", dtype=dtype)
    expected = {name: a.astype(np.dtype(dtype)) for name, a in tiny.arrays().items()}
    tiny.assert_holds(load(path), expected)
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == dtype


def test_the_widest_dtype_is_named(tmp_path):
    weights = tiny.arrays(dtype=np.float16)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float32)
    path = convert(tiny.write_single(tmp_path / "source", weights), tmp_path / "out")
    assert load(path).config.dtype == "float32"
    tiny.assert_holds(load(path), weights)


def test_what_lies_beside_the_weights_goes_along(tmp_path, source):
    files = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE")
    for name in files:
        (source / name).write_text(name)
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    (source / "optimizer.pt").write_text("not wanted")
    path = convert(source, tmp_path / "out")
    assert {file.name for file in path.iterdir()} == {*files, "config.json", "model.safetensors"}
    assert (path / "LICENSE").read_text() == "LICENSE"
    assert open_checkpoint(path).chat_template == "{{ x }}"


def test_an_existing_destination(tmp_path, source):
    path = convert(source, tmp_path / "out")
    before = (path / "model.safetensors").read_bytes()
    other = tiny.write_single(tmp_path / "other", tiny.arrays(seed=1))
    with pytest.raises(CheckpointError, match="out exists; pass overwrite=True"):
        convert(other, path)
    assert (path / "model.safetensors").read_bytes() == before
    convert(other, path, overwrite=True)
    tiny.assert_holds(load(path), tiny.arrays(seed=1))
    assert sorted(tmp_path.iterdir()) == sorted([path, source, other])


def test_what_is_no_checkpoint_is_never_overwritten(tmp_path, source):
    directory = tmp_path / "thesis"
    directory.mkdir()
    (directory / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis exists and holds no config.json"):
        convert(source, directory, overwrite=True)
    assert (directory / "chapter.tex").read_text() == "years of work"


def test_onto_itself(source):
    convert(source, source, dtype="float64", overwrite=True)
    assert load(source).weights.norm.dtype == np.float64


def test_nothing_is_left_of_a_failure(tmp_path):
    weights = tiny.arrays()
    weights["lm_head.weight"][0, 0] = 1e6
    source = tiny.write_single(tmp_path / "source", weights)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: 1e\+06 is too large"):
        convert(source, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == [source]


def test_a_failed_replacement_puts_the_old_back(tmp_path, source, monkeypatch):
    path = convert(source, tmp_path / "out")
    rename = type(path).rename

    def failing(self, target):
        if target == path and "float64" in (self / "config.json").read_text():
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", failing)
    with pytest.raises(CheckpointError, match="out cannot be written: disk on fire"):
        convert(source, path, dtype="float64", overwrite=True)
    tiny.assert_holds(load(path), tiny.arrays())
    assert sorted(tmp_path.iterdir()) == sorted([path, source])


def test_one_tensor_at_a_time(tmp_path):
    config = replace(
        tiny.TIED, intermediate_size=64, num_hidden_layers=40, hidden_size=64, head_dim=16
    )
    kind = gguf.GGMLQuantizationType.Q8_0
    path = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(config), config, quantised=kind)
    total = sum(4 * array.size for array in tiny.arrays(config).values())
    checkpoint = open_checkpoint(path)
    tracemalloc.start()
    try:
        dtypes = {name: info.read_dtype for name, info in checkpoint.tensors.items()}
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        write_safetensors(tmp_path / "x", dtypes, shapes, checkpoint.read)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < total / 4


def test_permissions_are_the_usual(tmp_path, source):
    plain = tmp_path / "plain"
    plain.mkdir()
    path = convert(source, tmp_path / "out")
    assert os.stat(path).st_mode == os.stat(plain).st_mode


@pytest.mark.parametrize("foreign", ["src", "main.py", "README.md"])
def test_no_other_file_is_lost(source, tmp_path, foreign):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"name": "my web app"}')
    if foreign == "src":
        (project / foreign).mkdir()
        (project / foreign / "code.py").write_text("mine")
    else:
        (project / foreign).write_text("mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"holds {foreign}, which would be lost"):
        convert(source, project, overwrite=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_shards_give_way_to_one_file(tmp_path):
    tiny.write_single(tmp_path / "a", tiny.arrays())
    convert(tmp_path / "a", tmp_path / "b")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "b" / name).write_text("old")
    convert(tmp_path / "a", tmp_path / "b", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_destination_through_a_link(tmp_path):
    tiny.write_single(tmp_path / "a", tiny.arrays())
    convert(tmp_path / "a", tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    convert(tmp_path / "a", tmp_path / "link", dtype="float16", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "link"]
    assert load(tmp_path / "b").weights.norm.dtype == np.float16


def test_a_destination_in_no_directory(tmp_path):
    tiny.write_single(tmp_path / "a", tiny.arrays())
    with pytest.raises(CheckpointError, match=r"/x/y: .*/x does not exist$"):
        convert(tmp_path / "a", tmp_path / "x" / "y")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "x").touch()
    with pytest.raises(CheckpointError, match=r"/x/y: .*/x is not a directory$"):
        convert(tmp_path / "a", tmp_path / "x" / "y")
