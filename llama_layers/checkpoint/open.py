"""From a path or name to an opened checkpoint or tokenizer, whatever format it is in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_layers.arrays.checks import is_integer
from llama_layers.checkpoint.checkpoint import Checkpoint
from llama_layers.checkpoint.gguf.open import open_gguf
from llama_layers.checkpoint.hub import fetch, hub_name
from llama_layers.checkpoint.known_models import KNOWN_MODELS, cached_path
from llama_layers.checkpoint.safetensors import INDEX, SINGLE, read_file, read_shards, tensor_infos
from llama_layers.checkpoint.tokenizer.chat import MORE_TEMPLATES, read_chat_templates
from llama_layers.checkpoint.tokenizer.directory import (
    open_tokenizer_directory,
    open_tokenizer_json,
)
from llama_layers.checkpoint.tokenizer.gguf import load_gguf_tokenizer
from llama_layers.checkpoint.tokenizer.tokenizer import Tokenizer
from llama_layers.config.llama_config import read_config
from llama_layers.errors import CheckpointError, shown
from llama_layers.files.json_files import JsonFile
from llama_layers.files.kinds import REWRITE, kind_of_file
from llama_layers.model.quantised import ADAPTER

_COMPANIONS = """
generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json
added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json LICENSE LICENSE.txt
NOTICE README.md
""".split()

_SHARD = r"-\d{5}-of-(?!00001)\d{5}\.safetensors$"
# Files that people have instead of a model in safetensors, and what to do with them.
_OTHER_FILES = {
    r"^adapter_(config\.json|model\.)": ADAPTER,
    _SHARD: f"shards of a model: load their directory, with {INDEX} in it",
    r"\.gguf$": "load that file itself",
    r"\.(bin|pth|pt|ckpt)$": "PyTorch's pickle files are not read, since they can run code: "
    + REWRITE,
}


def open_checkpoint(path: str | os.PathLike[str], /) -> Checkpoint:
    """Open a checkpoint: read its headers, and check them against its config.

    Parameters
    ----------
    path : str or path
        A Hugging Face directory (one safetensors file, or shards with an index), a .safetensors
        file with config.json beside it, a .gguf file, the name of a known model, or that of a
        model on the Hugging Face Hub: "org/name", "org/name/file.gguf", each with "@revision" if
        one is wanted. A path that exists comes first, then the Hub's cache on this computer.

    Returns
    -------
    Checkpoint
        No tensor is read yet.

    Raises
    ------
    CheckpointError
        If there is nothing there, it is malformed, or its tensors do not match its config.
    ConfigError
        If the config is incomplete or asks for what is not implemented.
    ImportError
        If the file has the block formats of GGUF, and the package ``gguf`` is not installed.

    Examples
    --------
    >>> from llama_layers.checkpoint import open_checkpoint
    >>> open_checkpoint("no-such-model")
    Traceback (most recent call last):
    llama_layers.errors.CheckpointError: no-such-model: no such file or directory, ...
    """
    found = _resolved(path)
    if found.is_dir():
        return _open_directory(found)
    if found.suffix == ".safetensors":
        return _open_safetensors(found, found, "safetensors file")
    if found.suffix == ".gguf":
        return open_gguf(found)
    kind = kind_of_file(found)
    advice = (f": {advice}" for name, advice in _OTHER_FILES.items() if re.search(name, found.name))
    raise CheckpointError(
        f"{found}: expected a Hugging Face directory, a .safetensors or a .gguf file"
        + (f", got {kind}" if kind else "".join(advice))
    )


def load_tokenizer(path: str | os.PathLike[str], /) -> Tokenizer:
    """Load a tokenizer, without the model.

    Parameters
    ----------
    path : str or path
        A Hugging Face directory, which needs no config.json and no weights, a tokenizer.json, a
        .gguf file, also one of a vocabulary only, or a name as `load` takes it; no weights are
        downloaded for it. What lies beside a tokenizer.json is read like that of a directory.

    Returns
    -------
    Tokenizer
        Text to token ids and back.

    Raises
    ------
    CheckpointError
        If there is nothing there, or it is malformed or of a kind that is not known.
    ImportError
        If the package ``tokenizers`` is not installed.
    TypeError
        If `path` is not a str or path.

    Examples
    --------
    >>> from llama_layers.checkpoint import load_tokenizer
    >>> load_tokenizer("smollm2-135m").encode("The capital of France is")  # doctest: +SKIP
    [504, 3575, 282, 4649, 314]
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or path, got {type(path).__name__}")
    found = _resolved(path, weights=False)
    if found.is_dir():
        return open_tokenizer_directory(found)
    if found.suffix == ".gguf":
        return load_gguf_tokenizer(found)
    if found.name == "tokenizer.json" or found.suffix == ".safetensors":
        return open_tokenizer_directory(found.parent)
    return open_tokenizer_json(found)


def _resolved(path: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The path itself, or the place where the model of that name is kept."""
    found, name = Path(path), os.fspath(path)
    if found.exists():
        return found
    if (of_the_hub := hub_name(name)) is not None:
        return fetch(of_the_hub, weights=weights)
    if name not in KNOWN_MODELS:
        raise CheckpointError(
            f"{name}: no such file or directory, not a known model ({', '.join(KNOWN_MODELS)}), "
            f"and not the name of a model on the Hugging Face Hub (org/name)"
        )
    if not (cached := cached_path(name)).exists():
        raise CheckpointError(
            f"{name} is not on this computer yet: run `llama-layers pull {name}` "
            f"(it would be in {cached})"
        )
    return cached


def _open_directory(directory: Path) -> Checkpoint:
    for name in (SINGLE, INDEX):  # the order of transformers, where both are there
        if (directory / name).is_file():
            return _open_safetensors(directory, directory / name, "Hugging Face directory")
    files = [file for file in directory.glob("*.safetensors") if file.is_file()]
    if len(files) == 1 and not files[0].name.startswith("adapter_"):
        return _open_safetensors(directory, files[0], "Hugging Face directory")
    raise CheckpointError(f"{directory}: expected {SINGLE} or {INDEX}, got {_held(directory)}")


def _held(directory: Path) -> str:
    """The contents of a directory without weights to read, and what to do with them."""
    names = sorted(entry.name for entry in directory.iterdir())
    for pattern, advice in _OTHER_FILES.items():
        if found := [name for name in names if re.search(pattern, name)]:
            return f"{', '.join(found[:4])}: {advice}"
    return ", ".join(names[:8]) or "nothing"


def _open_safetensors(path: Path, file: Path, kind: str) -> Checkpoint:
    """Open a .safetensors file or an index of them, with the config.json beside it."""
    directory = file.parent
    if re.search(_SHARD, file.name):
        raise CheckpointError(f"{path}: expected a whole model, got {_OTHER_FILES[_SHARD]}")
    header, maps = (read_shards if file.suffix == ".json" else read_file)(file)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: expected config.json beside {file.name}")
    config, ignored = read_config(directory)
    tensors = tensor_infos(path, header, config)
    meta = any(info.name != info.stored_name for info in tensors.values())
    return _DirectoryCheckpoint(
        path=path,
        format=kind + (", Meta names" if meta else ""),
        config=config,
        tensors=tensors,
        maps=maps,
        chat_template=read_chat_templates(directory).templates,
        generation_config=_generation_config(directory / "generation_config.json"),
        ignored_keys=ignored,
    )


class _DirectoryCheckpoint(Checkpoint):
    """Safetensors files, and what lies beside them in their directory."""

    def open_tokenizer(self) -> Tokenizer:
        return open_tokenizer_directory(self._directory)

    def companions(self) -> Mapping[str, bytes]:
        files = (file for file in self._companion_paths() if file.is_file())
        return {file.relative_to(self._directory).as_posix(): file.read_bytes() for file in files}

    def files(self) -> set[Path]:
        named = {self._directory / name for name in ("config.json", INDEX)}
        return super().files() | named | set(self._companion_paths())

    @property
    def _directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def _companion_paths(self) -> list[Path]:
        templates = sorted((self._directory / MORE_TEMPLATES).glob("*.jinja"))
        return [*(self._directory / name for name in _COMPANIONS), *templates]


def _generation_config(file: Path) -> Mapping[str, Any]:
    """The content of a file that may be missing; the ids that end a text are checked."""

    def check(content: Mapping[str, Any]) -> None:
        ends = content.get("eos_token_id")
        if ends is None:
            return
        for end in ends if isinstance(ends, list) else [ends]:
            if not is_integer(end):
                raise CheckpointError(f"{file}: eos_token_id: expected token ids, got {shown(end)}")

    return JsonFile(file, CheckpointError, check) if file.is_file() else {}
