"""Safetensors files: the headers of one file, or of shards with an index; and writing one."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.checkpoint.checkpoint import TensorInfo
from llama_layers.checkpoint.names import from_meta, renamed, telling_names
from llama_layers.checkpoint.our_order import in_our_order
from llama_layers.checkpoint.stored_numbers import NUMPY_DTYPES, STORED_DTYPES, map_file
from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import CheckpointError, shown
from llama_layers.files.json_files import read_json, without_duplicates
from llama_layers.files.kinds import is_safetensors, kind_of
from llama_layers.files.progress import progress
from llama_layers.model.quantised import why_not_plain
from llama_layers.model.weight_checks import is_inert

# The names of files in a directory. A shard may have another name, which the index gives.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"[^/]+-\d+-of-\d+\.safetensors")

# The format allows headers of 100 MB, which take ten seconds and two gigabytes to read; that of the
# largest Llama has 0.15 MB. The limit is for an index too.
_LONGEST_HEADER = 4_000_000

Maps = dict[Path, NDArray[np.uint8]]
Tensors = dict[str, TensorInfo]


def read_file(file: Path) -> tuple[Tensors, Maps]:
    """The tensors of a file by the names in it, and the bytes of the file.

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
    return {name: _tensor_info(file, start, name, said) for name, said in header.items()}, {
        file: content
    }


def _tensor_info(file: Path, start: int, name: str, said: dict[str, Any]) -> TensorInfo:
    begin, end = said["data_offsets"]
    return TensorInfo(
        name=name,
        stored_name=name,
        shape=tuple(said["shape"]),
        dtype=STORED_DTYPES.get(said["dtype"], str(said["dtype"])),
        file=file,
        offset=start + begin,
        nbytes=end - begin,
    )


def read_shards(index: Path) -> tuple[Tensors, Maps]:
    """The tensors of all files that an index names, and the bytes of the files.

    Only the files count, as in transformers: indices name tensors that no file has, such as a
    tied head, and leave out some that are there, such as buffers.
    """
    found: Tensors = {}
    maps: Maps = {}
    for shard in shards_of(index):
        file = index.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{index}: names the shard {shard}, which is missing")
        tensors, shard_map = read_file(file)
        for name in tensors:
            if name in found and not is_inert(name):
                raise CheckpointError(
                    f"{index}: {name} is in two shards, {found[name].file.name} and {shard}"
                )
        found |= tensors
        maps |= shard_map
    return found, maps


def with_hugging_face_names(path: Path, tensors: Tensors, config: LlamaConfig) -> Tensors:
    """The tensors under their Hugging Face names, if they are floats and not quantised."""
    weights = {name: info for name, info in tensors.items() if not is_inert(name)}
    if reason := why_not_plain({name: info.dtype for name, info in weights.items()}):
        raise CheckpointError(f"{path}: {reason}")
    for name, info in weights.items():
        if info.dtype not in NUMPY_DTYPES:
            raise CheckpointError(
                f"{info.file}: {name}: expected one of the dtypes {', '.join(STORED_DTYPES)}, "
                f"got {info.dtype}"
            )
    family = FAMILIES[config.model_type]
    if own := {theirs: name for name, theirs in family.stored_names.items()}:
        found = {renamed(name, own) or name: info for name, info in tensors.items()}
        tensors = {name: replace(info, name=name) for name, info in found.items()}
    meta, hugging_face = telling_names(weights)
    if meta is None:
        return in_our_order(path, tensors, config, family.fused, permuted=family.interleaved)
    if hugging_face is not None:
        raise CheckpointError(
            f"{path}: expected Hugging Face's names or Meta's, got {hugging_face} and {meta}: the "
            f"two order the rows of queries and keys differently"
        )
    names = {stored: from_meta(stored) for stored in tensors}
    found = {name: replace(tensors[stored], name=name) for stored, name in names.items()}
    return in_our_order(path, found, config, (), permuted=True)


def _check_kind(file: Path) -> None:
    """Raise CheckpointError unless a file begins like safetensors, with a header to read."""
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
    """Say how a file's size differs from that in its header; None if it does not."""
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
        return None  # a malformed header: the safetensors package says what is wrong with it


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


def holds_weights(name: str) -> bool:
    """Whether a file of that name holds weights, or says which files do."""
    return name in (SINGLE, INDEX) or SHARD.fullmatch(name) is not None


def write_safetensors(
    file: Path,
    dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Write tensors in the order given, each read when its turn comes."""
    words = {ours: theirs for theirs, ours in STORED_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, dtype in dtypes.items():
        start, end = end, end + FLOATS[dtype].itemsize * math.prod(shapes[name])
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
