"""Headers of safetensors files: one file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llama_layers.checkpoint.names import is_derived, is_meta, permuted_heads, to_hugging_face
from llama_layers.checkpoint.opened import TensorInfo, map_file
from llama_layers.config import LlamaConfig
from llama_layers.errors import CheckpointError

# The dtypes that hold weights, in the format's words and in ours.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

Maps = dict[Path, NDArray[np.uint8]]
Header = dict[str, dict[str, Any]]


def read_file(file: Path) -> tuple[Header, Maps]:
    """The tensors of a file: for each name "dtype", "shape", "file" and "data_offsets" in it.

    The safetensors package checks the header first: its size, its text, and that the tensors fill
    the file without gap or overlap.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: expected a safetensors file: {error}") from None
    content = map_file(file)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    for tensor in header.values():
        tensor["file"] = file
        tensor["data_offsets"] = [start + offset for offset in tensor["data_offsets"]]
    return header, {file: content}


def read_shards(index: Path) -> tuple[Header, Maps]:
    """The tensors of all files that an index names, each in the file that it names."""
    weight_map = _weight_map(index)
    header: Header = {}
    maps: Maps = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{index}: names the shard {shard}, which is missing on disk")
        tensors, shard_map = read_file(file)
        maps |= shard_map
        for name in tensors:
            if name in header:
                raise CheckpointError(
                    f"{index}: {name} is in two shards, {header[name]['file'].name} and {shard}"
                )
            if name not in weight_map:
                raise CheckpointError(f"{index}: does not name {name}, which is in {shard}")
        header |= tensors
    for name, shard in weight_map.items():
        if name not in header or header[name]["file"].name != shard:
            raise CheckpointError(f"{index}: names {name} in {shard}, where it is not")
    return header, maps


def tensor_infos(header: Header, config: LlamaConfig) -> dict[str, TensorInfo]:
    """The tensors of a header under their Hugging Face names."""
    meta = is_meta(header)
    infos: dict[str, TensorInfo] = {}
    for stored_name, tensor in header.items():
        name = to_hugging_face(stored_name, "meta") if meta else stored_name
        start, end = tensor["data_offsets"]
        if tensor["dtype"] not in DTYPES and not is_derived(name):
            raise CheckpointError(
                f"{tensor['file']}: {stored_name}: expected one of the dtypes "
                f"{', '.join(DTYPES)}, got {tensor['dtype']}"
            )
        if name in infos:
            raise CheckpointError(
                f"{tensor['file']}: {stored_name} and {infos[name].stored_name} are one tensor"
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


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: expected an object with a weight_map: {error!r}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: {name}: expected the name of a file beside the index, got {shard!r}"
            )
    return weight_map
