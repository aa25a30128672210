"""Tokenizers from tokenizer.json, and those that are refused."""

from __future__ import annotations

import sys

import pytest
import tiny
import tokenizers

from llama_layers import CheckpointError, load


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
