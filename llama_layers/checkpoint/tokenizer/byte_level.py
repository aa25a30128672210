"""Vocabularies of byte pairs over bytes, each of which is written as a character of its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from llama_layers.checkpoint.gguf.metadata import Section, shown
from llama_layers.checkpoint.tokenizer.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from llama_layers.checkpoint.tokenizer.vocabulary import Vocabulary

# Advice about a tokenizer that is not known.
INSTEAD = "load the model from a Hugging Face directory with its tokenizer.json"


def read_pre_tokenizer(file: Path, tables: Section) -> PreTokenizer:
    """Look up how the file says that text is cut; a CheckpointError if that is not known."""
    name = tables.get("pre", "")
    if name == "":
        warnings.warn(
            f"{file}: missing tokenizer.ggml.pre, which says how text is cut: taking llama.cpp's "
            f"default, which may not be the model's own",
            stacklevel=2,
        )
        name = "default"
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise tables.error(
            "pre",
            f"expected a known way to cut text, such as 'llama-bpe', 'qwen2' or 'tekken', got "
            f"{shown(name)}; {INSTEAD}",
        )
    return PRE_TOKENIZERS[name]


def build_byte_level(
    tokenizers: ModuleType, tables: Section, vocabulary: Vocabulary, cut: PreTokenizer
) -> Any:
    """Build the tokenizers.Tokenizer, but for special tokens."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab=vocabulary.tokens,
            merges=_merges(tables, vocabulary),
            ignore_merges=cut.ignore_merges,
        )
    )
    pre_tokenizers, decoders = tokenizers.pre_tokenizers, tokenizers.decoders
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            *(
                decoders.Replace(tokenizers.Regex(rf"\A{re.escape(token)}\z"), spelled)
                for token, spelled in _misread(vocabulary.found_first(), pre_tokenizers.ByteLevel)
            ),
            decoders.ByteLevel(),
        ]
    )
    return backend


def _merges(tables: Section, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The pairs that are merged, in order; the first of two equal ones counts."""
    pairs: dict[tuple[str, str], None] = {}
    ids = vocabulary.tokens
    for merge in tables.strings("merges"):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise tables.error(
                "merges",
                f"expected two tokens that make a third, with a space between, got {merge!r}",
            )
        pairs[left, right] = None
    return list(pairs)


def _misread(tokens: Iterable[str], byte_level: Any) -> Iterable[tuple[str, str]]:
    """Tokens that are found by their spelling and look like bytes, with their bytes as characters.

    DeepSeek's files have such tokens for letters whose characters stand for bytes outside UTF-8.
    """
    alphabet = set(byte_level.alphabet())
    spell = byte_level(add_prefix_space=False, use_regex=False).pre_tokenize_str
    for token in tokens:
        if not token.isascii() and alphabet.issuperset(token):
            yield token, spell(token)[0][0]
