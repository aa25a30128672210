"""Tokens that the files beside a tokenizer.json declare, read as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_layers.arrays.checks import is_integer
from llama_layers.errors import CheckpointError
from llama_layers.files.json_files import read_json_if_there

# In the order in which transformers adds those that a tokenizer lacks.
_NAMES = "bos_token eos_token unk_token sep_token pad_token cls_token mask_token".split()
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# The defaults of transformers' classes.
_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


@dataclass(frozen=True)
class DeclaredTokens:
    """Tokens, as arguments of ``tokenizers.AddedToken``."""

    named: dict[str, dict[str, Any] | None]
    """Tokens by name, such as ``bos_token``; None for one that the model does not have."""
    special: list[dict[str, Any]]
    """Special tokens without a name."""
    added: dict[int, dict[str, Any]]
    """Tokens to which the files give an id."""
    defaults: dict[str, str]
    """Tokens of further names, which count if the tokenizer has them."""


def read_declared_tokens(directory: Path) -> DeclaredTokens:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Older versions of transformers wrote the last two. They count only where the first has no
    ``added_tokens_decoder``; then the map takes precedence over it.
    """
    file = directory / "tokenizer_config.json"
    config = read_json_if_there(file, CheckpointError)
    named, special = _sorted_out(file, config)
    if "added_tokens_decoder" in config:
        added = _by_id(file, config["added_tokens_decoder"])
    else:
        old = directory / "special_tokens_map.json"
        named_in_map, special_in_map = _sorted_out(old, read_json_if_there(old, CheckpointError))
        named |= named_in_map
        special += special_in_map
        added = _added_tokens(directory / "added_tokens.json", [*named.values(), *special])
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    return DeclaredTokens(
        named={name: named[name] for name in [*_NAMES, *named] if name in named},
        special=special,
        added=added,
        defaults=_DEFAULTS.get(kind, {}),
    )


def _sorted_out(
    file: Path, content: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any] | None], list[dict[str, Any]]]:
    """The tokens of a file that have a name, None for one that is declared absent; the others."""
    named: dict[str, dict[str, Any] | None] = {}
    for key, value in content.items():
        model_specific = key.endswith("_token") and isinstance(value, str | dict)
        if key in _NAMES or model_specific:  # add_bos_token is a bool
            named[key] = None if value is None else _token(file, key, value)
    special: list[dict[str, Any]] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = content.get(key) or []
        if isinstance(value, dict):  # with names of their own
            named |= {name: _token(file, name, token) for name, token in value.items()}
        elif isinstance(value, list):
            special += [_token(file, key, token) for token in value]
        else:
            raise CheckpointError(f"{file}: {key}: expected a list or an object, got {value!r}")
    return named, special


def _by_id(file: Path, tokens: object) -> dict[int, dict[str, Any]]:
    if not isinstance(tokens, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder: expected an object, got {tokens!r}")
    name = "added_tokens_decoder"
    return {_id(file, key): _token(file, f"{name}.{key}", token) for key, token in tokens.items()}


def _added_tokens(file: Path, special: list[dict[str, Any] | None]) -> dict[int, dict[str, Any]]:
    """The content of added_tokens.json, which gives ids to texts; special are those declared so."""
    texts = {token["content"] for token in special if token is not None}
    return {
        _id(file, i): {"content": text, "special": text in texts, "normalized": text not in texts}
        for text, i in read_json_if_there(file, CheckpointError).items()
    }


def _id(file: Path, value: object) -> int:
    number = value if is_integer(value) else None
    if isinstance(value, str) and value.isdecimal() and len(value) < 11:
        number = int(value)
    if number is None or not 0 <= number < 2**32:
        raise CheckpointError(f"{file}: expected a token id, got {value!r}")
    return number


def _token(file: Path, name: str, value: object) -> dict[str, Any]:
    """A token that is given as a text, or as an object with its text and flags."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{file}: {name}: expected a token, got {value!r}")
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    for flag, given in flags.items():
        if not isinstance(given, bool):
            raise CheckpointError(f"{file}: {name}: {flag}: expected true or false, got {given!r}")
    return {"content": value["content"], **flags}
