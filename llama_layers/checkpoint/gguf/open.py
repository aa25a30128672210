"""From a GGUF file, or all parts of a split one, to an opened checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.checkpoint.checkpoint import Checkpoint, TensorInfo
from llama_layers.checkpoint.extras import require_installed
from llama_layers.checkpoint.gguf.config import ARCHITECTURES, PERMUTED, read_config
from llama_layers.checkpoint.gguf.header import GGUFHeader, read_gguf
from llama_layers.checkpoint.gguf.metadata import shown
from llama_layers.checkpoint.gguf.rope import DIVISORS
from llama_layers.checkpoint.names import from_gguf
from llama_layers.checkpoint.our_order import in_our_order
from llama_layers.checkpoint.stored_numbers import NUMPY_DTYPES, viewed
from llama_layers.checkpoint.tokenizer import Tokenizer
from llama_layers.checkpoint.tokenizer.gguf import (
    open_tokenizer,
    read_chat_template,
    tokenizer_files,
)
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.unsupported import but_it_has
from llama_layers.errors import CheckpointError, ConfigError
from llama_layers.model.fused_tensors import FUSED

_PART = re.compile(r"(.*)-\d{5}-of-(?!00000)(\d{5})\.gguf")
# RoPE frequencies, which old converters kept and llama.cpp never read.
_UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


def open_gguf(file: Path) -> Checkpoint:
    """Open a GGUF file of one of the `ARCHITECTURES`, given the file or any part of a split one."""
    parts = _open_parts(file)
    metadata = parts[0].metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: expected one of the architectures {', '.join(ARCHITECTURES)}, "
            f"got {shown(architecture)}{_why(architecture, metadata)}"
        )
    stored = _all_tensors(parts)
    _check_vectors(stored)
    maps = {part.file: part.data for part in parts}
    divisors = {
        name: _numbers(info, maps[info.file])
        for name in [name for name, readers in DIVISORS.items() if architecture in readers]
        if (info := stored.pop(name, None)) is not None
    }
    shapes = {name: info.shape for name, info in stored.items()}
    try:
        config, ends, ignored = read_config(metadata, shapes, divisors)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    if any(info.dtype not in NUMPY_DTYPES for info in stored.values()):
        require_installed("gguf", f"reading {file}")
    return _GGUFCheckpoint(
        path=file,
        format="GGUF file",
        config=config,
        tensors=in_our_order(
            file, _renamed(stored, config), config, FUSED, permuted=architecture in PERMUTED
        ),
        maps=maps,
        chat_template=read_chat_template(file, metadata),
        generation_config={"eos_token_id": list(ends)} if ends else {},
        ignored_keys=ignored,
        metadata=metadata,
    )


def _why(architecture: object, metadata: Mapping[str, Any]) -> str:
    """What an architecture has that is not supported, if that is known."""
    if not isinstance(architecture, str):
        return ""
    start = f"{architecture}."
    own = {key.removeprefix(start): v for key, v in metadata.items() if key.startswith(start)}
    return but_it_has(architecture, own)


@dataclass(frozen=True, eq=False, kw_only=True)
class _GGUFCheckpoint(Checkpoint):
    """A GGUF file, whose metadata holds its tokenizer."""

    metadata: Mapping[str, Any] = field(repr=False)

    @classmethod
    def opened(cls, path: Path) -> Checkpoint:
        return open_gguf(path)

    def open_tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.path, self.metadata)

    def companions(self) -> Mapping[str, bytes]:
        return tokenizer_files(self.path, self.metadata)


def gguf_parts(name: str) -> list[str]:
    """All parts of a split GGUF file, given one of them; the file itself if it is whole."""
    found = _PART.fullmatch(name)
    if found is None:
        return [name]
    start, count = found.groups()
    return [f"{start}-{part:05}-of-{count}.gguf" for part in range(1, int(count) + 1)]


def _open_parts(file: Path) -> list[GGUFHeader]:
    """The parts of a split file in order; the file alone if it is whole."""
    header = read_gguf(file)
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int):
        raise CheckpointError(f"{file}: split.count: expected an integer, got {shown(count)}")
    if count <= 1:
        return [header]
    files = [file.with_name(name) for name in gguf_parts(file.name)]
    if len(files) != count:
        raise CheckpointError(
            f"{file}: is one of {count} parts: expected a name that ends in "
            f"-00001-of-{count:05}.gguf, by which the others are found"
        )
    if missing := [part.name for part in files if not part.is_file()]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(
            f"{file}: is one of {count} parts: missing {', '.join(missing[:4])}{more}"
        )
    parts = [header if part == file else read_gguf(part) for part in files]
    _check_parts(parts)
    return parts


def _check_parts(parts: Sequence[GGUFHeader]) -> None:
    for number, part in enumerate(parts):
        for key, expected in (("split.no", number), ("split.count", len(parts))):
            value = part.metadata.get(key)
            if type(value) is not int or value != expected:
                raise CheckpointError(
                    f"{part.file}: {key}: expected {expected}, got {shown(value)}"
                )
    stated = parts[0].metadata.get("split.tensors.count")
    found = sum(len(part.tensors) for part in parts)
    if type(stated) is not int or stated != found:
        raise CheckpointError(
            f"{parts[0].file}: split.tensors.count: expected {found}, the tensors of all parts, "
            f"got {shown(stated)}"
        )


def _all_tensors(parts: Sequence[GGUFHeader]) -> dict[str, TensorInfo]:
    """The tensors of all parts, by their names in the files."""
    stored: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in stored:
                raise CheckpointError(f"{part.file}: {name} is in {stored[name].file} too")
            if not _UNUSED.fullmatch(name):
                stored[name] = info
    if not stored:
        raise CheckpointError(
            f"{parts[0].file}: expected a model, got a GGUF file without tensors, which has a "
            f"vocabulary at most"
        )
    return stored


def _check_vectors(stored: Mapping[str, TensorInfo]) -> None:
    """Raise if a norm or bias is in blocks, which llama.cpp cannot compute with either."""
    for name, info in stored.items():
        vector = len(info.shape) < 2 or name in DIVISORS
        if vector and info.dtype not in NUMPY_DTYPES:
            raise CheckpointError(
                f"{info.file}: {name}: expected floats for a vector, got blocks of {info.dtype}"
            )


def _numbers(info: TensorInfo, data: NDArray[np.uint8]) -> np.ndarray:
    return viewed(data[info.offset : info.offset + info.nbytes], info.dtype, info.shape)


def _renamed(stored: Mapping[str, TensorInfo], config: LlamaConfig) -> dict[str, TensorInfo]:
    """The tensors under their Hugging Face names."""
    found = {}
    for stored_name, info in stored.items():
        name = from_gguf(stored_name, config.model_type)
        if name is None:
            raise CheckpointError(
                f"{info.file}: {stored_name}: no {config.model_type} has a tensor of this name"
            )
        gate = stored_name.replace("ffn_up", "ffn_gate")
        if gate not in stored and info.shape[0] == 2 * config.intermediate_size:
            name = name.replace("mlp.up_proj", "mlp.gate_up_proj")
        found[name] = replace(info, name=name)
    return found
