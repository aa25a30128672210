"""From any checkpoint to a Hugging Face directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.checkpoint.atomic import new_checkpoint_directory
from llama_layers.checkpoint.casting import cast, checked_dtype
from llama_layers.checkpoint.opening import open_checkpoint
from llama_layers.checkpoint.progress import progress
from llama_layers.checkpoint.safetensors_files import DTYPES


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    /,
    *,
    dtype: Any = None,
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
        Whether to replace a checkpoint that is there. Files that the new one has not, its
        weights apart, are never removed: they are named, and nothing is done.

    Returns
    -------
    Path
        `destination`.

    Raises
    ------
    CheckpointError
        If the source cannot be opened, a number is too large for `dtype`, or the destination
        exists and `overwrite` is false, it is no checkpoint, or it holds other files than a
        checkpoint's, which would be lost.
    ValueError
        If `dtype` is none of the four.
    """
    name = None if dtype is None else checked_dtype(dtype)
    destination = Path(destination)
    with new_checkpoint_directory(destination, overwrite=overwrite) as directory:
        checkpoint = open_checkpoint(source)
        dtypes = {key: name or info.read_dtype for key, info in checkpoint.tensors.items()}
        shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
        widest = max(set(dtypes.values()), key=lambda d: (FLOATS[d].itemsize, FLOATS[d].precision))
        config = replace(checkpoint.config, dtype=widest)
        (directory / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
        for file, content in checkpoint.companions().items():
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_bytes(content)
        write_safetensors(
            directory / "model.safetensors",
            dtypes,
            shapes,
            lambda key: cast(key, checkpoint.read(key), name),
        )
    return destination


def write_safetensors(
    file: Path,
    dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], NDArray[Any]],
) -> None:
    """Write tensors in the order given, each read when its turn comes."""
    words = {ours: theirs for theirs, ours in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, dtype in dtypes.items():
        start, end = end, end + FLOATS[dtype].itemsize * int(np.prod(shapes[name], dtype=object))
        header[name] = {
            "dtype": words[dtype],
            "shape": shapes[name],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with file.open("xb") as stream, progress(f"Writing {file.name}", end) as advance:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in dtypes:
            array = np.ascontiguousarray(read(name))
            stream.write(array.reshape(-1).view(np.uint8).data)
            advance(array.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
