"""Models by the name that they have on the Hugging Face Hub, from a hub on the loopback address."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import huggingface_hub.constants
import huggingface_hub.utils
import pytest
import tokenizers

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import load_tokenizer, pull
from llama_layers.checkpoint.hub import HubName, _progress, hub_name
from tests.support import tiny
from tests.support.hub_server import COMMIT, PINNED, serving


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "hub-cache"


@pytest.fixture
def hub(monkeypatch, cache):
    constants = huggingface_hub.constants
    with serving() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template.replace(constants.ENDPOINT, hub.url),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def files_of(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture
def published(tmp_path):
    """A repository with what authors put there, wanted or not."""
    files = files_of(tiny.write_single(tmp_path / "single", tiny.arrays()))
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.onnx", "photo.png"]
    tokenizer = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{ }"}
    return files | tokenizer | dict.fromkeys(unwanted, b"unwanted")


def test_only_what_is_needed_is_downloaded_and_only_once(hub, published):
    hub.publish("org/tiny-1.0", published)
    tiny.assert_holds(load("org/tiny-1.0"), tiny.arrays())
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(hub.downloaded) == wanted
    hub.requests = 0
    tiny.assert_holds(load("org/tiny-1.0"), tiny.arrays())
    assert hub.requests == 0


def test_a_tokenizer_alone_needs_no_weights(hub, published):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 7}, unk_token="a"))
    hub.publish("org/tiny", published | {"tokenizer.json": words.to_str().encode()})
    for _ in range(2):
        assert load_tokenizer("org/tiny").encode("a") == [7]
        assert "model.safetensors" not in hub.downloaded
    tiny.assert_holds(load("org/tiny"), tiny.arrays())


def test_shards(hub, tmp_path):
    files = files_of(tiny.write_sharded(tmp_path / "sharded", tiny.arrays()))
    hub.publish("org/sharded", files | {"tokenizer.json": b"{}"})
    path = pull("org/sharded")
    tiny.assert_holds(load("org/sharded"), tiny.arrays())
    shard = path / "model-00002-of-00003.safetensors"
    shard.unlink()  # as an interrupted download leaves it
    tiny.assert_holds(load("org/sharded"), tiny.arrays())


def test_shards_of_other_names(hub, tmp_path):
    files = files_of(tiny.write_sharded(tmp_path / "sharded", tiny.arrays()))
    index = "model.safetensors.index.json"
    named = {
        n.replace("model-", "model.safetensors-", 1): c for n, c in files.items() if n != index
    }
    named[index] = files[index].replace(b'"model-', b'"model.safetensors-')
    hub.publish("org/sharded", named | {"tokenizer.json": b"{}"})
    tiny.assert_holds(load("org/sharded"), tiny.arrays())


def test_a_pinned_revision(hub, tmp_path, published):
    other = tiny.arrays(seed=1)
    hub.publish("org/tiny", published)
    hub.publish("org/tiny", files_of(tiny.write_sharded(tmp_path / "other", other)), PINNED)
    tiny.assert_holds(load(f"org/tiny@{PINNED}"), other)
    tiny.assert_holds(load("org/tiny"), tiny.arrays())
    with pytest.raises(CheckpointError, match="org/tiny@v9: the model has no revision 'v9'"):
        load("org/tiny@v9")


@pytest.mark.parametrize("parts", [1, 2])
def test_gguf_files(hub, tmp_path, parts):
    content = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays()).read_bytes()
    names = ["m-Q4.gguf"] if parts == 1 else ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    hub.publish("org/one", {name: content + name.encode() for name in names})
    assert pull("org/one").name == names[0]
    assert sorted(set(hub.downloaded)) == names
    hub.requests = 0
    assert pull("org/one").name == names[0]
    assert hub.requests == 0
    hub.publish("org/two", dict.fromkeys(["m-Q4.gguf", "sub/m-F32.gguf"], content))
    with pytest.raises(CheckpointError, match="expected one of its 2 GGUF files, such as"):
        load("org/two")
    tiny.assert_holds(load("org/two/sub/m-F32.gguf"), tiny.arrays())
    hub.requests = 0
    assert pull("org/two/sub/m-F32.gguf").name == "m-F32.gguf"
    assert hub.requests == 0
    with pytest.raises(CheckpointError, match=r"org/two/m-Q8.gguf: the repository has no m-Q8"):
        load("org/two/m-Q8.gguf")


def test_what_was_cached_without_a_model(hub):
    hub.publish("org/photos", {"photo.png": b"unwanted"})
    huggingface_hub.snapshot_download("org/photos")
    with pytest.raises(
        CheckpointError, match=r"org/photos: the repository has no model\.safetensors"
    ):
        load("org/photos")


def test_what_cannot_be_had_is_said_in_a_sentence(hub, monkeypatch, published):
    hub.publish("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    hub.gated.add("org/gated")
    for name, message in {
        "org/missing": r"org/missing: no such file or directory here, and no such model on the",
        "org/gated": rf"org/gated: its authors give it to those who ask: do so at {hub.url}/org/g",
        "org/pickled": r"org/pickled: the repository has no .* its PyTorch pickle files are not",
        "org/bad--name": "org/bad--name: expected the name of a model",
    }.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="org/tiny is not on this computer, and HF_HUB_OFFL"):
        load("org/tiny")


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    said = f"org/tiny is not on this computer, and {url} cannot be reached: Connection refused$"
    with pytest.raises(CheckpointError, match=said):
        load("org/tiny")


def test_offline_a_copy_without_a_tokenizer_serves(hub, monkeypatch, published):
    kept = {name: published[name] for name in ("config.json", "model.safetensors")}
    hub.publish("org/tiny", kept)
    pull("org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tiny.assert_holds(load("org/tiny"), tiny.arrays())


@pytest.mark.parametrize("filename", [None, "blobs/half"])
def test_a_full_disk_is_not_the_network(hub, monkeypatch, published, cache, filename):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)

    hub.publish("org/tiny", published)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    said = f"No space left on device; HF_HOME moves the cache: '{filename or cache}'"
    with pytest.raises(OSError, match=said):
        load("org/tiny")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"org/tiny: no such .*pip install 'llama-layers\[hub\]'"):
        load("org/tiny")


def test_a_path_that_exists_comes_first(hub, tmp_path, monkeypatch):
    tiny.write_single(tmp_path / "org" / "tiny", tiny.arrays())
    monkeypatch.chdir(tmp_path)
    tiny.assert_holds(load("org/tiny"), tiny.arrays())
    assert hub.requests == 0


@pytest.mark.parametrize(
    ("text", "name"),
    {
        "org/name": ("org/name", None, None),
        "Qwen/Qwen2.5-0.5B@main": ("Qwen/Qwen2.5-0.5B", None, "main"),
        f"a/b@{COMMIT}": ("a/b", None, COMMIT),
        "a/b/c.gguf": ("a/b", "c.gguf", None),
        "a/b/c/d.gguf@v1": ("a/b", "c/d.gguf", "v1"),
        "name": None,
        "a/b/c": None,
        "/a/b": None,
        "./a/b": None,
        "../b": None,
        "a/m.gguf": None,
        "a/m.safetensors": None,
        "a b/c": None,
        "": None,
    }.items(),
)
def test_names(text, name):
    assert hub_name(text) == (None if name is None else HubName(*name))
    assert name is None or str(hub_name(text)) == text


def test_from_the_command_line(hub, published, tmp_path):
    """In a process of its own, which takes the Hub's address from the environment as users do."""
    hub.publish("org/tiny", published)
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "llama_layers"]
    environment = {**os.environ, **own}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [*command, "info", "org/tiny"], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"snapshots/{COMMIT}" in done.stdout


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_progress_is_shown_on_a_terminal_where_it_is_wanted(monkeypatch, terminal, wanted):
    """And what the library does afterwards is as before."""
    utils = huggingface_hub.utils
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    before = utils.are_progress_bars_disabled()
    switch = {False: utils.disable_progress_bars, True: utils.enable_progress_bars}
    switch[wanted]()
    try:
        with _progress(huggingface_hub):
            assert utils.are_progress_bars_disabled() == (not (terminal and wanted))
        assert utils.are_progress_bars_disabled() == (not wanted)
    finally:
        switch[not before]()
