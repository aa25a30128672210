"""From a path to an opened checkpoint, whatever format it is in."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

from llama_layers.checkpoint.known_models import KNOWN_MODELS, cached_path
from llama_layers.checkpoint.names import is_meta
from llama_layers.checkpoint.opened import Checkpoint
from llama_layers.checkpoint.safetensors_files import read_file, read_shards, tensor_infos
from llama_layers.checkpoint.tokenizer import open_tokenizer_json
from llama_layers.config import read_config
from llama_layers.errors import CheckpointError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPANIONS = """
generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json
added_tokens.json vocab.json merges.txt chat_template.jinja LICENSE LICENSE.txt NOTICE README.md
""".split()


def open_checkpoint(path: str | os.PathLike[str], /) -> Checkpoint:
    """Open a checkpoint: read its headers, and check them against its config.

    Parameters
    ----------
    path : str or path
        A Hugging Face directory (one safetensors file, or shards with an index), a .safetensors
        file with config.json beside it, a .gguf file, or the name of a known model.

    Returns
    -------
    Checkpoint
        No tensor is read yet.

    Raises
    ------
    CheckpointError
        If there is nothing there, it is malformed, or its tensors are not those of its config.
    ConfigError
        If the config is incomplete or asks for what is not implemented.
    ImportError
        If the file is GGUF and the package ``gguf`` is not installed.

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
        from llama_layers.checkpoint.gguf_file import open_gguf

        return open_gguf(found)
    raise CheckpointError(
        f"{found}: expected a Hugging Face directory, a .safetensors or a .gguf file"
    )


def files_read(path: str | os.PathLike[str], /) -> set[Path]:
    """The files that a checkpoint is read from, resolved: weights, config and tokenizer."""
    checkpoint = open_checkpoint(path)
    files = {info.file for info in checkpoint.tensors.values()}
    if checkpoint.path.suffix != ".gguf":  # which has all in one file
        directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        files |= {directory / name for name in ("config.json", _INDEX, *_COMPANIONS)}
    return {file.resolve() for file in files}


def _resolved(path: str | os.PathLike[str]) -> Path:
    """The path itself, or where the known model of that name is kept."""
    found = Path(path)
    if found.exists():
        return found
    if (name := os.fspath(path)) not in KNOWN_MODELS:
        raise CheckpointError(
            f"{name}: no such file or directory, and no known model ({', '.join(KNOWN_MODELS)})"
        )
    if not (cached := cached_path(name)).exists():
        raise CheckpointError(
            f"{name} is not on this computer yet: run `llama-layers pull {name}` "
            f"(it would be in {cached})"
        )
    return cached


def _open_directory(directory: Path) -> Checkpoint:
    both = [directory / name for name in (_SINGLE, _INDEX) if (directory / name).is_file()]
    if len(both) == 2:
        raise CheckpointError(f"{directory}: expected {_SINGLE} or {_INDEX}, got both")
    files = both or sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        held = ", ".join(sorted(entry.name for entry in directory.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{directory}: expected {_SINGLE} or {_INDEX}, got {held}")
    return _open_safetensors(directory, files[0], "Hugging Face directory")


def _open_safetensors(path: Path, file: Path, kind: str) -> Checkpoint:
    """Open a .safetensors file or an index of them, with the config.json beside it."""
    directory = file.parent
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: expected config.json beside {file.name}")
    config, ignored = read_config(directory)
    header, maps = (read_shards if file.suffix == ".json" else read_file)(file)
    return Checkpoint(
        path=path,
        format=kind + (", Meta names" if is_meta(header) else ""),
        config=config,
        tensors=tensor_infos(header, config),
        chat_template=_chat_template(directory),
        _open_tokenizer=partial(open_tokenizer_json, directory / "tokenizer.json"),
        _companions=partial(_read_companions, directory),
        _maps=maps,
        ignored_keys=ignored,
    )


def _read_companions(directory: Path) -> dict[str, bytes]:
    files = (directory / name for name in _COMPANIONS)
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _chat_template(directory: Path) -> str | None:
    """The chat template: a file of its own in newer checkpoints, a key of another in older."""
    own, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    if not config.is_file():
        return None
    try:
        template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config}: expected a JSON object: {error}") from None
    return template if isinstance(template, str) else None
