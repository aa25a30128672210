"""Vocabularies in GGUF files, for tests of the tokenizers that they amount to."""

from __future__ import annotations

from llama_layers.checkpoint import load_tokenizer
from tests.support import gguf_files, tiny

TOKENS = tiny.TOKENIZER["tokenizer.ggml.tokens"]
TYPES = tiny.TOKENIZER["tokenizer.ggml.token_type"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = "▁ h e l o he ▁he ll ▁hell ▁hello".split()


def write(file, **tables):
    """A GGUF file of a vocabulary alone."""
    metadata = {"general.architecture": ("str", "llama")}
    for name, value in tables.items():
        key = name if "." in name else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            kind = {int: "i32", float: "f32", str: "str"}[type(value[0]) if value else str]
            metadata[key] = f"arr[{kind}]", value
        else:
            metadata[key] = gguf_files.kinds(x=value)["x"]
    file.write_bytes(gguf_files.encode(metadata).content)
    return file


def byte_pairs(**changes):
    tables = {key.removeprefix("tokenizer.ggml."): v for key, v in tiny.TOKENIZER.items()}
    tables = {key: v for key, v in tables.items() if "." not in key} | changes
    return {key: value for key, value in tables.items() if value is not None}


def sentence_pieces(words, scores=None, **changes):
    """A vocabulary of all bytes and of `words`, whose scores fall."""
    tables = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, *words],
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)],
        "scores": [0.0] * 259 + [float(s) for s in scores or range(0, -len(words), -1)],
    } | changes
    return {key: value for key, value in tables.items() if value is not None}


def tokenizer_of(file, tables):
    """The tokenizer of a vocabulary, written to a file."""
    return load_tokenizer(write(file, **tables))


def words_of(tokenizer, text, **options):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text, **options)]
