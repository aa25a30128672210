"""GGUF files in several parts, as llama.cpp's gguf-split writes them."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import convert, open_checkpoint
from llama_layers.checkpoint.gguf.open import gguf_parts
from tests.support import gguf_files, tiny


def write_parts(directory, most_tensors=5, **options):
    """A tiny model in parts, by the writer of the gguf package; its weights and the parts."""
    weights = tiny.arrays()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(
        directory / "m.gguf", "llama", split_max_tensors=most_tensors, **options
    )
    for key, value in tiny.gguf_keys(tiny.CONFIG, "llama").items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"llama.{key}", value)
    for name, array in tiny.with_permuted_rope_rows(weights, tiny.CONFIG).items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights, sorted(directory.glob("*.gguf"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("m-00002-of-00002.gguf", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]),
        ("a/m-00001-of-00001.gguf", ["a/m-00001-of-00001.gguf"]),
        ("m-00001-of-00000.gguf", ["m-00001-of-00000.gguf"]),  # not of a split file
        ("m-1-of-2.gguf", ["m-1-of-2.gguf"]),
        ("m.gguf", ["m.gguf"]),
    ],
)
def test_names_of_parts(name, parts):
    assert gguf_parts(name) == parts


@pytest.mark.parametrize("options", [{}, {"small_first_shard": True}])
@pytest.mark.parametrize("given", [0, 1, -1])
def test_any_part_opens_all(tmp_path, options, given):
    weights, parts = write_parts(tmp_path, **options)
    assert len(parts) == 5 + ("small_first_shard" in options)
    model = load(parts[given])
    assert model.config == tiny.CONFIG
    tiny.assert_holds(model, weights)
    assert open_checkpoint(parts[given]).files() == set(parts)


def test_conversion(tmp_path):
    weights, parts = write_parts(tmp_path)
    with pytest.warns(UserWarning, match="no tokenizer is written"):
        convert(parts[0], tmp_path / "out")
    tiny.assert_holds(load(tmp_path / "out"), weights)


def test_parts_that_are_missing(tmp_path):
    _, parts = write_parts(tmp_path, most_tensors=3)
    assert len(parts) == 7
    parts[2].unlink()
    message = re.escape(f"{parts[0]}: is one of 7 parts: missing {parts[2].name}")
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        open_checkpoint(parts[0])
    for part in parts[3:]:
        part.unlink()
    with pytest.raises(CheckpointError, match=r"missing m-00003.*, m-00006-of-00007.gguf and 1 m"):
        open_checkpoint(parts[1])


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00004.gguf", "m-1-of-5.gguf"])
def test_a_name_that_does_not_say_which(tmp_path, name):
    _, parts = write_parts(tmp_path)
    parts[0].rename(tmp_path / name)
    with pytest.raises(CheckpointError, match="one of 5 parts: expected a name that ends in "):
        open_checkpoint(tmp_path / name)


def test_a_whole_file_may_be_named_like_a_part(tmp_path):
    path = tiny.write_gguf(tmp_path / "m-00001-of-00003.gguf", tiny.arrays())
    assert load(path).config == tiny.CONFIG
    path = tiny.write_gguf(path, tiny.arrays(), metadata={"split.count": 1, "split.no": 0})
    assert load(path).config == tiny.CONFIG


def split(directory, changes=(), moved=()):
    """Two parts of a tiny model, whose metadata may be changed by part and key."""
    tensors = gguf_files.llama()
    names = list(tensors)
    held = [names[:9], names[9:] + list(moved)]
    for part in range(2):
        metadata = {
            **(gguf_files.MODEL if part == 0 else {}),
            "split.no": ("u16", part),
            "split.count": ("u16", 2),
            "split.tensors.count": ("i32", len(tensors)),
        }
        metadata |= dict(changes).get(part, {})
        metadata = {key: value for key, value in metadata.items() if value is not None}
        content = gguf_files.encode(metadata, {name: tensors[name] for name in held[part]}).content
        (directory / f"m-{part + 1:05}-of-00002.gguf").write_bytes(content)
    return directory / "m-00001-of-00002.gguf"


def test_two_parts(tmp_path):
    tensors = gguf_files.llama()
    weights = load(split(tmp_path)).weights
    assert np.array_equal(weights.embed_tokens, tensors["token_embd.weight"])
    assert np.array_equal(weights.lm_head, tensors["output.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: {"split.no": ("u16", 0)}}, "00002-of-00002.gguf: split.no: expected 1, got 0"),
        ({1: {"split.no": None}}, "00002-of-00002.gguf: split.no: expected 1, got None"),
        ({0: {"split.no": ("u16", 1)}}, "00001-of-00002.gguf: split.no: expected 0, got 1"),
        ({1: {"split.no": ("arr[u16]", [1, 1])}}, "split.no: expected 1, got an array"),
        ({1: {"split.count": ("u16", 3)}}, "00002.gguf: split.count: expected 2, got 3"),
        ({1: {"split.count": None}}, "00002.gguf: split.count: expected 2, got None"),
        ({0: {"split.tensors.count": ("i32", 20)}}, "tensors.count: expected 21, .* got 20"),
        ({0: {"split.tensors.count": ("arr[i32]", [21, 21])}}, "expected 21, .* got an array"),
        ({0: {"split.tensors.count": None}}, "tensors.count: expected 21, .* got None"),
        ({0: {"split.count": ("str", "2")}}, "split.count: expected an integer, got '2'"),
        ({0: {"split.count": ("u32", 2**32 - 1)}}, "one of 4294967295 parts: expected a name"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(split(tmp_path, changes))


def test_a_tensor_in_two_parts(tmp_path):
    changes = {0: {"split.tensors.count": ("i32", 22)}}
    path = split(tmp_path, changes, moved=["token_embd.weight"])
    with pytest.raises(CheckpointError, match=r"00002.gguf: token_embd.weight is in .*00001-of"):
        open_checkpoint(path)


def test_a_part_that_is_cut_off(tmp_path):
    path = split(tmp_path)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(second.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"00002-of-00002.gguf: expected a GGUF file of"):
        open_checkpoint(path)
