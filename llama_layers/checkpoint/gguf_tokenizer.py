"""The tokenizer that a GGUF file's metadata amounts to."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.tokenizer import Tokenizer
from llama_layers.errors import CheckpointError

# GGUF's token types.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# How text is cut before byte pairs are merged, by GGUF's name for it. Only ways that have been
# held against the original tokenizer are here: another way gives other ids, without an error.
_PRE_TOKENIZERS = ("smollm",)


def load_gguf_tokenizer(file: Path) -> Tokenizer:
    """Load the tokenizer of a GGUF file."""
    from llama_layers.checkpoint.gguf_file import _read  # which imports this module

    return open_tokenizer(file, _read(file)[0])


def open_tokenizer(file: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Open the tokenizer that a file's metadata amounts to."""
    backend = build_tokenizer(file, metadata)
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return Tokenizer(
        backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={
            f"{name}_token": token
            for name, i in ids.items()
            if i is not None and (token := backend.id_to_token(i)) is not None
        },
    )


def build_tokenizer(file: Path, metadata: Mapping[str, Any]) -> Any:
    """The tokenizers.Tokenizer for a file; a CheckpointError if it is of a kind not known."""
    tokenizers = require("tokenizers", f"the tokenizer of {file}")
    model = metadata.get("tokenizer.ggml.model")
    cut = metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or cut not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{file}: expected a tokenizer of model 'gpt2' and pre-tokenizer "
            f"{' or '.join(map(repr, _PRE_TOKENIZERS))}, got {model!r} and {cut!r}; pass token "
            f"ids, or load the model from a Hugging Face directory with its tokenizer.json"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix", False):
        raise CheckpointError(f"{file}: tokenizer.ggml.add_space_prefix: expected false, got true")
    tokens, kinds, merges = _tables(file, metadata)
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    _add_ends(backend, file, metadata, tokens)
    return backend


def tokenizer_files(file: Path, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Make tokenizer.json and tokenizer_config.json; nothing, with a warning, if not known."""
    try:
        tokenizer = build_tokenizer(file, metadata)
    except CheckpointError as error:
        warnings.warn(f"no tokenizer is written: {error}", stacklevel=2)
        return {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{metadata['general.architecture']}.context_length"],
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            config[f"{ours}_token"] = metadata["tokenizer.ggml.tokens"][token]
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _tables(file: Path, metadata: Mapping[str, Any]) -> tuple[list[str], list[int], list[str]]:
    try:
        tokens, kinds, merges = (
            metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "merges")
        )
    except KeyError as error:
        raise CheckpointError(f"{file}: missing {error.args[0]}") from None
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file}: expected {len(tokens)} different tokens and a type for each, got "
            f"{len(set(tokens))} and {len(kinds)}"
        )
    if unknown := set(kinds) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
        raise CheckpointError(
            f"{file}: tokenizer.ggml.token_type: expected 1, 3, 4 or 5 for byte pairs, got "
            f"{', '.join(map(str, sorted(unknown)))}"
        )
    return tokens, kinds, merges


def _add_ends(backend: Any, file: Path, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Put the tokens that begin and end a text around it, where the metadata says so."""
    tokenizers = require("tokenizers", f"the tokenizer of {file}")
    template = ["$A"]
    special = []
    for end in ("bos", "eos"):
        if metadata.get(f"tokenizer.ggml.add_{end}_token", False):
            i = metadata.get(f"tokenizer.ggml.{end}_token_id")
            if i is None or i >= len(tokens):
                raise CheckpointError(
                    f"{file}: tokenizer.ggml.{end}_token_id: expected a token's id, since "
                    f"add_{end}_token is true, got {i}"
                )
            template = [tokens[i], *template] if end == "bos" else [*template, tokens[i]]
            special.append((tokens[i], i))
    if special:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=special
        )
