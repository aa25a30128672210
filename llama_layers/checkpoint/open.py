"""From a path or name to an opened checkpoint or tokenizer, whatever format it is in."""

from __future__ import annotations

import os
from pathlib import Path

from llama_layers.checkpoint.checkpoint import Checkpoint
from llama_layers.checkpoint.directory import advice_on, open_directory, open_safetensors
from llama_layers.checkpoint.gguf.header import read_gguf
from llama_layers.checkpoint.gguf.open import open_gguf
from llama_layers.checkpoint.hub import fetch, hub_name
from llama_layers.checkpoint.known_models import KNOWN_MODELS, cached_path
from llama_layers.checkpoint.tokenizer import Tokenizer
from llama_layers.checkpoint.tokenizer.directory import (
    open_tokenizer_directory,
    open_tokenizer_json,
)
from llama_layers.checkpoint.tokenizer.gguf import open_tokenizer
from llama_layers.errors import CheckpointError
from llama_layers.files.kinds import kind_of_file
from llama_layers.files.output import using_cache


def open_checkpoint(path: str | os.PathLike[str], /) -> Checkpoint:
    """Open a checkpoint: read its headers, and check them against its config.

    Parameters
    ----------
    path : str or path
        A directory, a file or the name of a model, as `llama_layers.load` takes it.

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
        return open_directory(found)
    if found.suffix == ".safetensors":
        return open_safetensors(found, found)
    if found.suffix == ".gguf":
        return open_gguf(found)
    kind, advice = kind_of_file(found), advice_on(found.name)
    raise CheckpointError(
        f"{found}: expected a Hugging Face directory, a .safetensors or a .gguf file"
        + (f", got {kind}" if kind else f": {advice}" if advice else "")
    )


def load_tokenizer(path: str | os.PathLike[str], /) -> Tokenizer:
    """Load a tokenizer, without the model.

    Parameters
    ----------
    path : str or path
        A Hugging Face directory, which needs no config.json and no weights, a tokenizer.json, a
        .gguf file, also one of a vocabulary only, or a name as `load` takes it; no weights are
        downloaded for it. Files beside a tokenizer.json are read as in a directory.

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
        return open_tokenizer(found, read_gguf(found).metadata)
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
    with using_cache():
        cached = cached_path(name)
        there = cached.exists()
    if not there:
        raise CheckpointError(
            f"{name} is not on this computer yet: run `llama-layers pull {name}` "
            f"(it would be in {cached})"
        )
    return cached
