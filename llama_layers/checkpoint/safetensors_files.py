"""Headers of safetensors files: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llama_layers.checkpoint.names import permuted_heads, telling_names, to_hugging_face
from llama_layers.checkpoint.opened import TensorInfo, map_file
from llama_layers.config import LlamaConfig
from llama_layers.errors import CheckpointError, shown
from llama_layers.json_files import read_json, without_duplicates
from llama_layers.quantised import why_not_plain
from llama_layers.weight_names import is_inert

# The dtypes that hold weights, in the format's words and in ours.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

# The format allows 100 MB, which take ten seconds and two gigabytes to read; the largest Llama has
# 0.15 MB. The same bounds an index.
_LONGEST_HEADER = 4_000_000

Maps = dict[Path, NDArray[np.uint8]]
Header = dict[str, dict[str, Any]]


def read_file(file: Path) -> tuple[Header, Maps]:
    """The tensors of a file: for each name "dtype", "shape", "file" and "data_offsets" in it.

    The safetensors package checks the header first: its text, and that the tensors fill the file
    without gap or overlap.
    """
    try:
        start = 8 + _header_length(file)
        with safe_open(file, framework="numpy"):
            pass
        content = map_file(file)
        header = json.loads(content[8:start].tobytes(), object_pairs_hook=without_duplicates)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{file}: expected a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    for tensor in header.values():
        tensor["file"] = file
        tensor["data_offsets"] = [start + offset for offset in tensor["data_offsets"]]
    return header, {file: content}


def read_shards(index: Path) -> tuple[Header, Maps]:
    """The tensors of all files that an index names.

    Only the files count, as in transformers: indices name tensors that no file has, such as a
    tied head, and leave out some that are there, such as buffers.
    """
    header: Header = {}
    maps: Maps = {}
    for shard in shards_of(index):
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{index}: names the shard {shard}, which is missing on disk")
        tensors, shard_map = read_file(file)
        maps |= shard_map
        for name in tensors:
            if name in header and not is_inert(name):
                raise CheckpointError(
                    f"{index}: {name} is in two shards, {header[name]['file'].name} and {shard}"
                )
        header |= tensors
    return header, maps


def tensor_infos(path: Path, header: Header, config: LlamaConfig) -> dict[str, TensorInfo]:
    """The tensors of a header under their Hugging Face names."""
    weights = {name: tensor for name, tensor in header.items() if not is_inert(name)}
    if reason := why_not_plain({name: str(tensor["dtype"]) for name, tensor in weights.items()}):
        raise CheckpointError(f"{path}: {reason}")
    meta = _has_meta_names(path, weights)
    infos: dict[str, TensorInfo] = {}
    for stored_name, tensor in header.items():
        name = to_hugging_face(stored_name, "meta") if meta else stored_name
        start, end = tensor["data_offsets"]
        if tensor["dtype"] not in DTYPES and stored_name in weights:
            raise CheckpointError(
                f"{tensor['file']}: {stored_name}: expected one of the dtypes "
                f"{', '.join(DTYPES)}, got {tensor['dtype']}"
            )
        infos[name] = TensorInfo(
            name=name,
            stored_name=stored_name,
            shape=tuple(tensor["shape"]),
            dtype=DTYPES.get(tensor["dtype"], str(tensor["dtype"])),
            file=tensor["file"],
            offset=start,
            nbytes=end - start,
            permuted_heads=permuted_heads(name, config) if meta else None,
        )
    return infos


def _has_meta_names(path: Path, names: Iterable[str]) -> bool:
    """Whether tensors have the names of Meta's own releases; a CheckpointError if only some do."""
    meta, hugging_face = telling_names(names)
    if meta is not None and hugging_face is not None:
        raise CheckpointError(
            f"{path}: expected Hugging Face's names or Meta's, got {hugging_face} and {meta}: the "
            f"two order the rows of queries and keys differently"
        )
    return meta is not None


def _header_length(file: Path) -> int:
    if not file.is_file():
        raise ValueError("not a regular file")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes is too large, over {_LONGEST_HEADER}")
    return length


def shards_of(index: Path) -> list[str]:
    """The files that an index names, each once."""
    if (size := index.stat().st_size) > _LONGEST_HEADER:
        raise CheckpointError(f"{index}: expected at most {_LONGEST_HEADER} bytes, got {size}")
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: expected a weight_map of names to files, got {shown(weight_map)}"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: {name}: expected the name of a file beside the index, got {shard!r}"
            )
    return list(dict.fromkeys(weight_map.values()))
