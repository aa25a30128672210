"""From a Hugging Face directory, or a safetensors file in one, to an opened checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llama_layers.arrays.checks import is_integer
from llama_layers.checkpoint.checkpoint import Checkpoint
from llama_layers.checkpoint.names import telling_names
from llama_layers.checkpoint.safetensors import (
    INDEX,
    SINGLE,
    read_file,
    read_shards,
    with_hugging_face_names,
)
from llama_layers.checkpoint.tokenizer import Tokenizer
from llama_layers.checkpoint.tokenizer.chat import MORE_TEMPLATES, read_chat_templates
from llama_layers.checkpoint.tokenizer.directory import open_tokenizer_directory
from llama_layers.config.llama_config import read_config
from llama_layers.errors import CheckpointError, shown
from llama_layers.files.json_files import JsonFile
from llama_layers.files.kinds import REWRITE
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


def open_directory(directory: Path) -> Checkpoint:
    """Open the model in a directory."""
    for name in (SINGLE, INDEX):  # the order of transformers, where both are there
        if (directory / name).is_file():
            return open_safetensors(directory, directory / name)
    files = [file for file in directory.glob("*.safetensors") if file.is_file()]
    if len(files) == 1 and not files[0].name.startswith("adapter_"):
        return open_safetensors(directory, files[0])
    raise CheckpointError(f"{directory}: expected {SINGLE} or {INDEX}, got {_held(directory)}")


def advice_on(name: str) -> str | None:
    """Say what to do with a file that people have instead of safetensors; None if unknown."""
    return next((said for like, said in _OTHER_FILES.items() if re.search(like, name)), None)


def _held(directory: Path) -> str:
    """The contents of a directory without weights to read, and what to do with them."""
    names = sorted(entry.name for entry in directory.iterdir())
    for pattern, advice in _OTHER_FILES.items():
        if found := [name for name in names if re.search(pattern, name)]:
            return f"{', '.join(found[:4])}: {advice}"
    return ", ".join(names[:8]) or "nothing"


def open_safetensors(path: Path, file: Path) -> Checkpoint:
    """Open a .safetensors file or an index of them; `path` is what the user gave, for messages."""
    directory = file.parent
    if re.search(_SHARD, file.name):
        raise CheckpointError(f"{path}: expected a whole model, got {_OTHER_FILES[_SHARD]}")
    tensors, maps = (read_shards if file.suffix == ".json" else read_file)(file)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: expected config.json beside {file.name}")
    config, ignored = read_config(directory)
    tensors = with_hugging_face_names(path, tensors, config)
    kind = "Hugging Face directory" if path.is_dir() else "safetensors file"
    meta, _ = telling_names(info.stored_name for info in tensors.values())
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

    @classmethod
    def opened(cls, path: Path) -> Checkpoint:
        return open_directory(path) if path.is_dir() else open_safetensors(path, path)

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
        return self.place if self.place.is_dir() else self.place.parent

    def _companion_paths(self) -> list[Path]:
        templates = sorted((self._directory / MORE_TEMPLATES).glob("*.jinja"))
        return [*(self._directory / name for name in _COMPANIONS), *templates]


def _generation_config(file: Path) -> Mapping[str, Any]:
    """The content of a file that may be missing; the ids that end a text are checked."""

    return JsonFile(file, CheckpointError, partial(_check_ends, file)) if file.is_file() else {}


def _check_ends(file: Path, content: Mapping[str, Any]) -> None:
    ends = content.get("eos_token_id")
    if ends is None:
        return
    for end in ends if isinstance(ends, list) else [ends]:
        if not is_integer(end):
            raise CheckpointError(f"{file}: eos_token_id: expected token ids, got {shown(end)}")
