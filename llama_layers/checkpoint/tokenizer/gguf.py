"""From a GGUF file's metadata to a tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.gguf.metadata import Section, shown
from llama_layers.checkpoint.tokenizer import Tokenizer
from llama_layers.checkpoint.tokenizer.byte_level import (
    INSTEAD,
    build_byte_level,
    read_pre_tokenizer,
)
from llama_layers.checkpoint.tokenizer.chat import in_one_file
from llama_layers.checkpoint.tokenizer.sentencepiece import build_sentencepiece
from llama_layers.checkpoint.tokenizer.vocabulary import (
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from llama_layers.errors import CheckpointError

_TEMPLATE = "tokenizer.chat_template"


def open_tokenizer(file: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of a file, whose ids equal llama.cpp's, with its chat templates."""
    backend, vocabulary = _build(file, metadata)
    chat = in_one_file(file, read_chat_template(file, metadata))
    return Tokenizer(
        backend,
        chat_template=chat.templates,
        template_files=chat.files,
        special_tokens=vocabulary.special_tokens(),
    )


def tokenizer_files(file: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Make tokenizer.json and tokenizer_config.json; none, with a warning, if that fails."""
    try:
        backend, vocabulary = _build(file, metadata)
        template = read_chat_template(file, metadata)
        text = _written(file, backend)
    except CheckpointError as error:
        warnings.warn(f"no tokenizer is written: {error}", stacklevel=2)
        return {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
        **vocabulary.special_tokens(),
    }
    if isinstance(template, str):
        config["chat_template"] = template
    elif template:
        config["chat_template"] = [{"name": k, "template": v} for k, v in template.items()]
    return {
        "tokenizer.json": text.encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _build(file: Path, metadata: Mapping[str, Any]) -> tuple[Any, Vocabulary]:
    """The tokenizers.Tokenizer of a file, and the tables that it is made of."""
    tables = Section(metadata, "tokenizer.ggml.", lambda said: CheckpointError(f"{file}: {said}"))
    model = tables.get("model")
    if model is None or model == "none":
        key = "tokenizer.ggml.model"
        problem = f"missing {key}" if model is None else f"{key} is 'none'"
        raise CheckpointError(f"{file}: {problem}: this file has no tokenizer")
    if not isinstance(model, str) or model not in ("llama", "gpt2"):
        raise tables.error("model", f"expected 'llama' or 'gpt2', got {shown(model)}; {INSTEAD}")
    cut = read_pre_tokenizer(file, tables) if model == "gpt2" else None
    vocabulary = read_vocabulary(tables)
    tokenizers = require("tokenizers", f"the tokenizer of {file}")
    if cut is None:
        backend, adds_bos = build_sentencepiece(tokenizers, tables, vocabulary), True
    else:
        backend, adds_bos = build_byte_level(tokenizers, tables, vocabulary, cut), cut.adds_bos
    # Phi-3's tokens take the white space after them.
    name = str(metadata.get("general.name", "")).lower()
    strips = "phi-3" in name or "phi3" in name
    backend.add_tokens(
        [
            tokenizers.AddedToken(
                token,
                special=kind != USER_DEFINED,
                normalized=False,
                rstrip=strips and token not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for token, kind in vocabulary.found_first().items()
        ]
    )
    _add_ends(tokenizers, backend, tables, vocabulary, adds_bos)
    return backend, vocabulary


def _add_ends(
    tokenizers: ModuleType, backend: Any, tables: Section, vocabulary: Vocabulary, adds_bos: bool
) -> None:
    """Put the tokens that begin and end a text around it, where the metadata says so."""
    tokens = vocabulary.special_tokens()
    template = ["$A"]
    special = []
    for end, default in (("bos", adds_bos), ("eos", False)):
        key = f"add_{end}_token"
        if not tables.flag(key, default):
            continue
        if f"{end}_token" not in tokens:
            if key not in tables:
                continue
            raise tables.error(
                f"{end}_token_id",
                f"expected a token's id, since {key} is true, got "
                f"{shown(tables.get(f'{end}_token_id'))}",
            )
        token = tokens[f"{end}_token"]
        template = [end, *template] if end == "bos" else [*template, end]
        special.append({"id": end, "ids": [vocabulary.tokens[token]], "tokens": [token]})
    if special:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=special
        )


def read_chat_template(file: Path, metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or templates by name where there are several; "default" is the nameless."""
    named = {
        key.removeprefix(f"{_TEMPLATE}."): metadata[key]
        for key in metadata
        if key.startswith(f"{_TEMPLATE}.")
    }
    default = {"default": metadata[_TEMPLATE]} if _TEMPLATE in metadata else {}
    templates = default | named
    for name, template in templates.items():
        if not isinstance(template, str):
            raise CheckpointError(
                f"{file}: the chat template {name!r}: expected a text, got {shown(template)}"
            )
    return templates if named else templates.get("default")


def _written(file: Path, backend: Any) -> str:
    """The content of a tokenizer.json."""
    try:
        return backend.to_str(pretty=True)
    except Exception:  # tokenizers raises nothing narrower, where a step is in Python
        raise CheckpointError(
            f"{file}: merges by scores that are equal, which tokenizer.json cannot express"
        ) from None
