"""A tokenizer from the files of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.tokenizer.chat import read_chat_templates
from llama_layers.checkpoint.tokenizer.special_tokens import DeclaredTokens, read_declared_tokens
from llama_layers.checkpoint.tokenizer.tokenizer import Tokenizer, backend_errors
from llama_layers.errors import CheckpointError
from llama_layers.files.json_files import read_json_if_there
from llama_layers.files.kinds import kind_of_file


def open_tokenizer_directory(directory: Path) -> Tokenizer:
    """Open tokenizer.json, with what the files beside it say of its tokens and the chat format."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{directory}: no tokenizer.json, so text cannot be tokenised: "
            f"put the tokenizer.json of the model there"
        )
    backend = _read(file)
    declared = read_declared_tokens(directory)
    _add_tokens(backend, declared, file)
    names: dict[str, str | None] = {
        name: None if token is None else token["content"] for name, token in declared.named.items()
    }
    for name, text in declared.defaults.items():
        if backend.token_to_id(text) is not None:
            names.setdefault(name, text)
    if not names:
        names = _guessed(backend, directory / "config.json")
    elif backend.padding is not None:
        names.setdefault("pad_token", backend.padding["pad_token"])
    chat = read_chat_templates(directory)
    return Tokenizer(
        backend,
        chat_template=chat.templates,
        template_files=chat.files,
        special_tokens={name: text for name, text in names.items() if text is not None},
    )


def open_tokenizer_json(file: Path) -> Tokenizer:
    """Open a tokenizer.json alone."""
    backend = _read(file)
    names = _guessed(backend, None)
    special_tokens = {name: text for name, text in names.items() if text is not None}
    return Tokenizer(backend, special_tokens=special_tokens)


def _read(file: Path) -> Any:
    tokenizers = require("tokenizers", "reading tokenizer.json")
    if (kind := kind_of_file(file)) is not None:
        raise CheckpointError(f"{file}: expected a tokenizer.json, got {kind}")
    with backend_errors(f"{file}: expected a tokenizer.json"):
        return tokenizers.Tokenizer.from_file(str(file))


def _add_tokens(backend: Any, declared: DeclaredTokens, file: Path) -> None:
    """Add the declared tokens that the tokenizer lacks, and give those it has their flags."""
    added_token = require("tokenizers", "reading tokenizer.json").AddedToken
    added = sorted(declared.added.items())
    with backend_errors(f"{file}: cannot add the tokens of the files beside it"):
        new = [(i, t["content"]) for i, t in added if backend.token_to_id(t["content"]) is None]
        backend.add_tokens([added_token(**token) for _, token in added])
        there = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        special = [t for t in [*declared.named.values(), *declared.special] if t is not None]
        backend.add_special_tokens(
            [there.get(t["content"]) or added_token(**(t | {"special": True})) for t in special]
        )
    for i, text in new:
        if (got := backend.token_to_id(text)) != i:
            raise CheckpointError(
                f"{file.parent}: expected {text!r} to follow the tokens of tokenizer.json, "
                f"got id {i}, where the next is {got}"
            )


def _guessed(backend: Any, config: Path | None) -> dict[str, str | None]:
    """The special tokens of a tokenizer whose files name none.

    They are those that it puts around a text itself, or for an unknown one, and otherwise those
    whose ids config.json has.
    """
    padding = backend.padding
    backend.no_padding()
    backend.no_truncation()
    with backend_errors("the tokenizer cannot encode a letter"):
        letter = backend.encode("a")
    around = zip(letter.tokens, letter.special_tokens_mask, strict=True)
    special = [token if is_special else None for token, is_special in around]
    found = {
        "bos_token": special[0] if special else None,
        "eos_token": special[-1] if len(special) > 1 else None,
        "unk_token": getattr(backend.model, "unk_token", None),
        "pad_token": padding and padding["pad_token"],
    }
    content = read_json_if_there(config, CheckpointError) if config else {}
    return {
        name: token or _token_of(backend, content, f"{name}_id") for name, token in found.items()
    }


def _token_of(backend: Any, config: Mapping[str, Any], key: str) -> str | None:
    """The token of an id in config.json, or of the first of several; None if there is none."""
    i = config.get(key)
    if isinstance(i, list) and i:
        i = i[0]
    if not isinstance(i, int) or not 0 <= i < 2**32:
        return None
    return backend.id_to_token(i)
