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
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import CheckpointError, shown
from llama_layers.files.json_files import read_json, without_duplicates
from llama_layers.files.kinds import is_safetensors, kind_of
from llama_layers.model.quantised import why_not_plain
from llama_layers.model.weight_checks import is_inert

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
    _check_kind(file)
    content = map_file(file)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    try:
        with safe_open(file, framework="numpy"):
            pass
        header = json.loads(content[8:start].tobytes(), object_pairs_hook=without_duplicates)
    except (SafetensorError, ValueError, OSError) as error:
        problem = _wrong_size(content, start) or f": {error}"
        raise CheckpointError(f"{file}: expected a safetensors file{problem}") from None
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
            raise CheckpointError(f"{index}: names the shard {shard}, which is missing")
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


def _check_kind(file: Path) -> None:
    """Raise if the first bytes are not those of a safetensors file with a header to read."""
    if not file.is_file():
        raise CheckpointError(f"{file}: expected a safetensors file: not a regular file")
    with file.open("rb") as stream:
        first = stream.read(64)
    length = int.from_bytes(first[:8], "little")
    kind = None if is_safetensors(first) else kind_of(first)
    if kind is None and length >= 2**32:  # no length, but text, or numbers
        kind = f"one that begins {first[:8]!r}"
    if kind is not None:
        raise CheckpointError(f"{file}: expected a safetensors file, got {kind}")
    if length > _LONGEST_HEADER:
        raise CheckpointError(
            f"{file}: expected a safetensors file: a header of {length} bytes is too large, "
            f"over {_LONGEST_HEADER}"
        )


def _wrong_size(content: NDArray[np.uint8], start: int) -> str | None:
    """Say what size a file has instead of that in its header; None if that is not the problem."""
    size = content.size
    if size < start:
        return f" of {start} bytes or more, where its header ends, got {size}"
    try:
        tensors = json.loads(content[8:start].tobytes())
        tensors.pop("__metadata__", None)
        ends = ((tensor["data_offsets"][1], name) for name, tensor in tensors.items())
        end, last = max(ends, default=(0, "its header"))
        if size == start + end:
            return None
        more = " or more" if size < start + end else ""
        return f" of {start + end} bytes{more}, where {last} ends, got {size}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None  # a malformed header, of which the safetensors package says what is wrong


def shards_of(index: Path) -> list[str]:
    """The files that an index names, each once."""
    if (size := index.stat().st_size) > _LONGEST_HEADER:
        raise CheckpointError(f"{index}: expected at most {_LONGEST_HEADER} bytes, got {size}")
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{index}: missing weight_map, which says in which file a tensor is")
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
