"""Tokenizers from tokenizer.json, and those that are refused."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import tokenizers

from llama_layers import CheckpointError, generate, load
from llama_layers.checkpoint import Tokenizer, convert, load_tokenizer, open_checkpoint
from tests.support import tiny


def write_tokenizer(directory, **options):
    """A tokenizer of words that begins each text with <s>."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<s>": 0, "hello": 1, "world": 2, "?": 3}, unk_token="?")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    if options.get("truncation"):
        backend.enable_truncation(2)
        backend.enable_padding(length=6)
    backend.save(str(directory / "tokenizer.json"))


def test_a_directory(tmp_path):
    tiny.write_single(tmp_path, tiny.arrays())
    write_tokenizer(tmp_path)
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer.encode("hello big world") == [0, 1, 3, 2]
    assert tokenizer.decode([0, 1, 2]) == "<s> hello world"


def test_a_text_is_neither_cut_nor_padded(tmp_path):
    tiny.write_single(tmp_path, tiny.arrays())
    write_tokenizer(tmp_path, truncation=True)
    tokenizer = load(tmp_path).tokenizer
    assert tokenizer.encode("hello world world") == [0, 1, 2, 2]
    assert tokenizer.encode("hello") == [0, 1]


@pytest.mark.parametrize("text", ["", "{", "{}", '{"model": 3}'])
def test_a_malformed_file(tmp_path, text):
    tiny.write_single(tmp_path, tiny.arrays())
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer\.json"):
        _ = load(tmp_path).tokenizer


def test_a_tokenizer_without_a_model(tmp_path):
    write_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).encode("hello") == [0, 1]
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).encode("hello") == [0, 1]
    (tmp_path / "tokenizer.json").rename(tmp_path / "mine.json")
    assert load_tokenizer(tmp_path / "mine.json").encode("hello") == [0, 1]
    with pytest.raises(CheckpointError, match=r": no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.txt: expected a tokenizer\.json"):
        load_tokenizer(tmp_path / "text.txt")
    with pytest.raises(TypeError, match="path: expected a str or path, got int"):
        load_tokenizer(3)


def test_a_tokenizer_of_a_gguf_file(tmp_path):
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.arrays(), metadata=tiny.TOKENIZER)
    assert load_tokenizer(file).encode("ab") == [8]


def test_a_name_beside_a_file_of_weights(tmp_path):
    tiny.write_single(tmp_path, tiny.arrays())
    write_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "model.safetensors").encode("hello") == [0, 1]


@pytest.mark.parametrize("numbers", [list, tuple, np.array, iter])
def test_ids_of_any_kind(tmp_path, numbers):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(numbers([0, 1, 2])) == "<s> hello world"
    assert "".join(tokenizer.stream(numbers([1, 2]))) == "hello world"


def test_ids_without_a_token_give_no_text(tmp_path):
    """Models have more rows in their embedding than tokens, and may draw one of them."""
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = [4, 1, 10**6, 2**31, 2**32, 10**30, 2]
    assert tokenizer.decode(ids) == "hello world"
    assert "".join(tokenizer.stream(ids)) == "hello world"


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, -1], ValueError, "ids: expected token ids, zero or more, got -1"),
        ([1.0], TypeError, "ids: expected integers, got float"),
        (["1"], TypeError, "ids: expected integers, got str"),
        ("hello", TypeError, "ids: expected integers, got str"),
        ([[1]], TypeError, "ids: expected integers, got list"),
        ([None], TypeError, "ids: expected integers, got NoneType"),
    ],
)
def test_ids_that_are_not_ids(tmp_path, ids, error, message):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for method in (tokenizer.decode, lambda ids: list(tokenizer.stream(ids))):
        with pytest.raises(error, match=message):
            method(ids)


def test_texts_that_are_not_text(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in (None, 3, b"a", ["a"]):
        with pytest.raises(TypeError, match="text: expected a str, got"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"text: expected valid Unicode, got .* at position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TypeError, match=r"backend: expected a tokenizers\.Tokenizer, got int"):
        Tokenizer(3)


def test_what_the_package_raises(tmp_path):
    """A panic, which is a BaseException, and a bare Exception."""
    write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    good = json.loads(file.read_text())
    slow = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    file.write_text(json.dumps(good | {"normalizer": slow}))
    with pytest.raises(CheckpointError, match=r"the tokenizer cannot encode this text: .*retry"):
        load_tokenizer(tmp_path).encode("a" * 32 + "!")
    good["model"]["unk_token"] = "absent"
    file.write_text(json.dumps(good))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(CheckpointError, match=r"cannot encode this text: .*Missing"):
        load_tokenizer(tmp_path).encode("big")


def test_a_key_pressed_while_the_package_works(monkeypatch, tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)

    class Interrupted:
        def encode(self, *_, **__):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("hello")


def test_more_templates_survive_conversion(tmp_path):
    source = tiny.write_single(tmp_path / "source", tiny.arrays())
    (source / "chat_template.jinja").write_text("D")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("R")
    path = convert(source, tmp_path / "out")
    assert open_checkpoint(path).chat_template == {"default": "D", "rag": "R"}


def test_the_generation_config(tmp_path):
    source = tiny.write_single(tmp_path / "source", tiny.arrays())
    assert load(source).generation_config == {}
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3], "top_p": 0.9}')
    assert load(source).generation_config == {"eos_token_id": [2, 3], "top_p": 0.9}
    assert load(source / "model.safetensors").generation_config["top_p"] == 0.9
    (source / "generation_config.json").write_text("[" * 100_000)
    model = load(source)  # whose weights do not depend on it
    with pytest.raises(CheckpointError, match=r"generation_config\.json: .* nested too deeply"):
        generate(model, np.array([[1]]), max_new_tokens=1)


@pytest.mark.parametrize("ends", ["</s>", [2, "</s>"], [2, None], {"a": 1}, 2.5, True])
def test_ends_that_are_no_ids(tmp_path, ends):
    source = tiny.write_single(tmp_path, tiny.arrays())
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model = load(source)
    with pytest.raises(CheckpointError, match=r"/generation_config\.json: eos_token_id: expected"):
        generate(model, np.array([[1]]), max_new_tokens=1)


def test_the_package_is_missing(tmp_path, monkeypatch):
    tiny.write_single(tmp_path, tiny.arrays())
    write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizers: pip install 'llama-layers\[models\]'"):
        _ = load(tmp_path).tokenizer
