"""Convert any checkpoint to a Hugging Face directory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.types import DType
from llama_layers.checkpoint.checkpoint import Checkpoint, TensorInfo
from llama_layers.checkpoint.names import renamed
from llama_layers.checkpoint.open import open_checkpoint
from llama_layers.checkpoint.safetensors import SINGLE, holds_weights, write_safetensors
from llama_layers.checkpoint.stored_numbers import checked_dtype
from llama_layers.config.families import FAMILIES
from llama_layers.errors import CheckpointError
from llama_layers.files.directories import finish_exchange, new_directory
from llama_layers.layers.tensors import Names
from llama_layers.model.fused_tensors import tensors_in_files
from llama_layers.model.rope_rows import permute_rope_rows, permuted_heads


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    /,
    *,
    dtype: str | DType | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint as a Hugging Face directory.

    One tensor at a time is in memory. The directory appears when it is complete. Queries, keys and
    values of a layer lie next to each other in its file, so that `load` maps them as one matrix.

    Parameters
    ----------
    source : str or path
        What `load` takes: a directory, a file, or the name of a model.
    destination : str or path
        The directory to make: config.json, model.safetensors, and what the source has of
        tokenizer, generation config and license.
    dtype : str or dtype, optional
        "float16", "bfloat16", "float32" or "float64", to round or widen the weights to. As
        stored, if not given; the block formats of GGUF become float32.
    overwrite : bool
        Whether to replace a checkpoint that is there. Files that the new one lacks, other than
        weights, are never removed: they are named, and nothing is done.

    Returns
    -------
    Path
        `destination`.

    Raises
    ------
    CheckpointError
        If the source cannot be opened, a number is too large for `dtype`, or the destination
        exists and `overwrite` is false, it is not a checkpoint, or it holds other files than a
        checkpoint's, which would be lost.
    ValueError
        If `dtype` is not one of the four.
    """
    name = None if dtype is None else checked_dtype(dtype)
    destination = Path(destination)
    with new_checkpoint_directory(destination, overwrite=overwrite) as directory:
        checkpoint = open_checkpoint(source)
        tensors = checkpoint.tensors
        dtypes = {key: name or info.read_dtype for key, info in tensors.items()}
        config = replace(checkpoint.config, dtype=_widest(dtypes.values()))
        (directory / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
        for file, content in checkpoint.companions().items():
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_bytes(content)
        names = FAMILIES[config.model_type].stored_names
        stored = {
            renamed(key, names) or key: parts for key, parts in tensors_in_files(config).items()
        }
        written = {key: _widest(dtypes[part] for part in parts) for key, parts in stored.items()}
        write_safetensors(
            directory / SINGLE,
            written,
            {key: _together([tensors[part] for part in parts]) for key, parts in stored.items()},
            lambda key: _as_in_files(checkpoint, stored[key], written[key]),
        )
    return destination


def _widest(dtypes: Iterable[str]) -> str:
    return max(set(dtypes), key=lambda d: (FLOATS[d].itemsize, FLOATS[d].precision))


def _together(parts: Sequence[TensorInfo]) -> tuple[int, ...]:
    """The shape of tensors below each other."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _as_in_files(checkpoint: Checkpoint, parts: Names, dtype: str) -> np.ndarray:
    """Tensors below each other, with their rows in the order of the family's files."""
    config, arrays = checkpoint.config, []
    for part in parts:
        array = checkpoint.read(part, dtype)
        heads = permuted_heads(part, config)
        if FAMILIES[config.model_type].interleaved and heads is not None:
            array = permute_rope_rows(array, heads, config.rotary_dim)
        arrays.append(array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@contextmanager
def new_checkpoint_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that takes the name of the path if the block ends well.

    Only a checkpoint is overwritten, and only if no file but its weights is lost. First the
    leftovers of a process that was killed are put in order.
    """
    for parent in (path.parent, path.resolve().parent):  # which differ where it is a link
        if not parent.is_dir():
            problem = "is not a directory" if parent.exists() else "does not exist"
            raise CheckpointError(f"{path}: {parent} {problem}")
    path = path.resolve()
    finish_exchange(path)
    if path.exists():
        if not path.is_dir():
            raise CheckpointError(f"{path}: expected a directory to make, got a file")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} exists and holds no config.json, so it is left alone")
        if not overwrite:
            raise CheckpointError(f"{path} exists; pass overwrite=True to replace it")

    def check_nothing_is_lost(replacement: Path) -> None:
        kept = {entry.name for entry in replacement.iterdir()}
        lost = sorted(
            entry.name
            for entry in path.iterdir()
            if entry.name not in kept and not (entry.is_file() and holds_weights(entry.name))
        )
        if lost:
            raise CheckpointError(
                f"{path} holds {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}, which "
                f"would be lost: choose another directory, or move that away"
            )

    with new_directory(path, check_nothing_is_lost) as directory:
        yield directory
