"""From a path to an opened checkpoint, whatever format it is in."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from llama_layers.checkpoint.chat_files import MORE_TEMPLATES, read_chat_template
from llama_layers.checkpoint.known_models import KNOWN_MODELS, cached_path
from llama_layers.checkpoint.names import is_meta
from llama_layers.checkpoint.opened import Checkpoint
from llama_layers.checkpoint.safetensors_files import read_file, read_shards, tensor_infos
from llama_layers.checkpoint.tokenizer import Tokenizer
from llama_layers.checkpoint.tokenizer_files import open_tokenizer_directory, open_tokenizer_json
from llama_layers.config import LlamaConfig
from llama_layers.errors import CheckpointError
from llama_layers.files import JsonFile

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_COMPANIONS = """
generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json
added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json LICENSE LICENSE.txt
NOTICE README.md
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
        from llama_layers.checkpoint.gguf_file import open_gguf

        return open_gguf(found)
    raise CheckpointError(
        f"{found}: expected a Hugging Face directory, a .safetensors or a .gguf file"
    )


def load_tokenizer(path: str | os.PathLike[str], /) -> Tokenizer:
    """Load a tokenizer, without the model.

    Parameters
    ----------
    path : str or path
        A Hugging Face directory, which needs no config.json and no weights, a tokenizer.json, a
        .gguf file, also one of a vocabulary only, or the name of a known model. What lies beside
        a file of the name tokenizer.json is read like that of a directory.

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
    found = _resolved(path)
    if found.is_dir():
        return open_tokenizer_directory(found)
    if found.suffix == ".gguf":
        from llama_layers.checkpoint.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(found)
    if found.name == "tokenizer.json" or found.suffix == ".safetensors":
        return open_tokenizer_directory(found.parent)
    return open_tokenizer_json(found)


def files_read(path: str | os.PathLike[str], /) -> set[Path]:
    """The files that a checkpoint is read from, resolved: weights, config and tokenizer."""
    checkpoint = open_checkpoint(path)
    files = set(checkpoint._maps)
    if checkpoint.path.suffix != ".gguf":  # which has all in one file
        directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        files |= {directory / name for name in ("config.json", _INDEX)}
        files |= set(_companions(directory))
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
    config = LlamaConfig.from_json(directory)
    suggested = directory / "generation_config.json"
    header, maps = (read_shards if file.suffix == ".json" else read_file)(file)
    return Checkpoint(
        path=path,
        format=kind + (", Meta names" if is_meta(header) else ""),
        config=config,
        tensors=tensor_infos(header, config),
        chat_template=read_chat_template(directory),
        generation_config=JsonFile(suggested, CheckpointError) if suggested.is_file() else {},
        _open_tokenizer=partial(open_tokenizer_directory, directory),
        _companions=partial(_read_companions, directory),
        _maps=maps,
    )


def _companions(directory: Path) -> list[Path]:
    """The files other than config and weights, whether they are there or not."""
    templates = sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
    return [*(directory / name for name in _COMPANIONS), *templates]


def _read_companions(directory: Path) -> dict[str, bytes]:
    files = (file for file in _companions(directory) if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}
