"""Tokenizers: from tokenizer.json, from GGUF, and those that are refused."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import tokenizers

from llama_layers import CheckpointError, load
from llama_layers.checkpoint import convert

TOKENS = tiny.TOKENIZER["tokenizer.ggml.tokens"]
TYPES = tiny.TOKENIZER["tokenizer.ggml.token_type"]


def gguf_with(tmp_path, **changes):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    path = tmp_path / "m.gguf"
    return tiny.write_gguf(path, tiny.arrays(), metadata=tiny.TOKENIZER | changes)


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


def test_the_package_is_missing(tmp_path, monkeypatch):
    tiny.write_single(tmp_path, tiny.arrays())
    write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizers: pip install tokenizers"):
        _ = load(tmp_path).tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("ab", [8]),
        ("ab ab", [8, 9]),
        ("12", [5, 6]),  # the merge "1 2" never applies: digits stand alone
        ("ab<s>ab", [8, 0, 8]),  # the name of a special token is that token
        ("<tool>a", [2, 3]),
        ("", []),
    ],
)
def test_gguf(tmp_path, text, ids):
    tokenizer = load(gguf_with(tmp_path)).tokenizer
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_gguf_adds_what_its_metadata_says(tmp_path):
    tokenizer = load(gguf_with(tmp_path, add_bos_token=True, add_eos_token=True)).tokenizer
    assert tokenizer.encode("ab") == [0, 8, 1]
    tokenizer = load(gguf_with(tmp_path, add_bos_token=True, add_eos_token=False)).tokenizer
    assert tokenizer.encode("ab") == [0, 8]


def test_gguf_survives_conversion(tmp_path):
    path = convert(gguf_with(tmp_path, add_bos_token=True), tmp_path / "out")
    tokenizer = load(path).tokenizer
    assert tokenizer.encode("ab 12<tool>") == [0, 8, 7, 5, 6, 2]
    assert tokenizer.decode([0, 8, 7, 5, 6, 2]) == "<s>ab 12<tool>"
    config = json.loads((path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["model_max_length"] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "expected a tokenizer of model 'gpt2' .*got 'llama' and 'smollm'"),
        ({"pre": "llama-bpe"}, "pre-tokenizer 'smollm', got 'gpt2' and 'llama-bpe'"),
        ({"pre": None}, "got 'gpt2' and None"),
        ({"add_space_prefix": True}, "add_space_prefix: expected false, got true"),
        ({"merges": None}, "missing tokenizer.ggml.merges"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "expected 12 different tokens .*, got 11 and 12"),
        ({"token_type": TYPES[:-1]}, "expected 12 different tokens .*, got 12 and 11"),
        ({"token_type": [*TYPES[:-1], 6]}, "expected 1, 3, 4 or 5 for byte pairs, got 6"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id: expected a token's id"),
        ({"add_eos_token": True, "eos_token_id": 12}, "eos_token_id: expected .*, got 12"),
    ],
)
def test_gguf_that_would_be_read_wrongly(tmp_path, changes, message):
    model = load(gguf_with(tmp_path, **changes))
    with pytest.raises(CheckpointError, match=f"m.gguf: .*{message}"):
        _ = model.tokenizer
