"""Files that are something else than their name says, or of another size than they should be."""

from __future__ import annotations

import io
import pickle
import re
import zipfile

import pytest
from safetensors.numpy import save

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import load_tokenizer
from tests.support import tiny

# The example of git-lfs's own specification (docs/spec.md).
LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    return file.getvalue()


@pytest.fixture(scope="module")
def gguf_content(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tiny.write_gguf(file, tiny.arrays())
    return file.read_bytes()


OTHERS = {
    "empty": (b"", "got an empty file"),
    "lfs": (LFS, "got a Git LFS pointer, .*run `git lfs pull`"),
    "html": (b"\n<!DOCTYPE html>\n<html>", "got a web page: the download failed"),
    "xml": (b'<?xml version="1.0"?><Error>', "got a web page: the download failed"),
    "zip": (zipped(), "got a zip archive, as PyTorch writes them, .*save_pretrained"),
    **{
        f"pickle {protocol}": (
            pickle.dumps({"a": b"x" * 9}, protocol=protocol),
            "got a pickle, as PyTorch writes them, .*save_pretrained",
        )
        for protocol in (2, 3, 4, 5)
    },
}


def refused(path, message):
    return pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{message}")


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "b.gguf", "c.bin", "d"])
@pytest.mark.parametrize(("content", "message"), OTHERS.values(), ids=OTHERS)
def test_what_holds_no_weights(tmp_path, name, content, message, config):
    if config:
        tiny.write_config(tmp_path)
    file = tmp_path / name
    file.write_bytes(content)
    with refused(file, message):
        load(file)
    if name == "model.safetensors":
        with refused(file, message):
            load(tmp_path)


@pytest.mark.parametrize("name", ["b.safetensors", "c.bin", "d"])
def test_a_gguf_file_of_another_name(tmp_path, name, gguf_content):
    file = tmp_path / name
    file.write_bytes(gguf_content)
    with refused(file, "got a GGUF file: rename it to end in .gguf$"):
        load(file)


@pytest.mark.parametrize("name", ["b.gguf", "c.bin", "d"])
def test_a_safetensors_file_of_another_name(tmp_path, name):
    tiny.write_single(tmp_path, tiny.arrays())
    file = (tmp_path / "model.safetensors").rename(tmp_path / name)
    with refused(file, "got a safetensors file: rename it to end in .safetensors$"):
        load(file)


@pytest.mark.parametrize("content", [LFS, b"<html>", b""], ids=["lfs", "html", "empty"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_json_file_that_is_none(tmp_path, name, content):
    tiny.write_config(tmp_path)
    if name == "config.json":
        tiny.write_single(tmp_path, tiny.arrays())
    (tmp_path / name).write_bytes(content)
    read = load_tokenizer if name == "tokenizer.json" else load
    with pytest.raises(
        ValueError, match=rf"/{re.escape(name)}: expected .*, got an? (Git|web|empt)"
    ):
        read(tmp_path)


def test_a_header_of_the_length_that_begins_like_a_pickle(tmp_path):
    """A length of 640 is 80 02 in hexadecimal, as a pickle of protocol 2 begins."""
    text = b'{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(640)
    content = (640).to_bytes(8, "little") + text
    assert content[:2] == pickle.dumps(0, protocol=2)[:2]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with refused(file, "of 652 bytes or more, where model.norm.weight ends, got 648$"):
        load(tmp_path)


@pytest.mark.parametrize("text", [b"Entry not found", b'{"error":"Not found"}'])
def test_an_error_in_place_of_weights(tmp_path, text):
    """As servers send them, which some programs save under the name of the file."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(text)
    with refused(file, re.escape(f"got one that begins {text[:8]!r}") + "$"):
        load(file)


@pytest.mark.parametrize("cut", [1, 200])
def test_a_truncated_safetensors_file(tmp_path, cut):
    tiny.write_single(tmp_path, tiny.arrays())
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    size = len(content)
    with refused(
        file, f"safetensors file of {size} bytes or more, where .* ends, got {size - cut}$"
    ):
        load(tmp_path)


def test_a_safetensors_file_cut_within_its_header(tmp_path):
    tiny.write_single(tmp_path, tiny.arrays())
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(content[:100])
    with refused(file, f"of {header} bytes or more, where its header ends, got 100$"):
        load(tmp_path)


def test_a_safetensors_file_with_more_behind_it(tmp_path):
    content = save(tiny.arrays())
    tiny.write_config(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(content + b"\0\0")
    size = len(content)
    with refused(file, f"safetensors file of {size} bytes, where .* ends, got {size + 2}$"):
        load(tmp_path)
