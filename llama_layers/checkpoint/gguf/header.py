"""The header of a GGUF file: its metadata, and where its tensors lie.

The format is published with llama.cpp (ggml's docs/gguf.md), and what llama.cpp's own reader
refuses is refused, except gaps between tensors, which change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.checkpoint.checkpoint import TensorInfo
from llama_layers.checkpoint.gguf.metadata import Metadata, Walk
from llama_layers.checkpoint.stored_numbers import STORED_DTYPES, map_file
from llama_layers.errors import CheckpointError
from llama_layers.files.kinds import kind_of

# By GGUF's number: a type's name, the numbers in a block, and the bytes that a block takes.
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip
_INTEGERS = {24: "I8", 25: "I16", 26: "I32", 27: "I64"}
_MOST_AXES = 4


@dataclass(frozen=True, eq=False)
class GGUFHeader:
    """The part of a GGUF file before its tensors, and the bytes of the whole file."""

    file: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    """By name, in the order of the header."""
    data: NDArray[np.uint8]


def read_gguf(file: Path) -> GGUFHeader:
    """Read the header of a GGUF file, which may hold a vocabulary alone, without tensors."""
    if not file.stat().st_size:
        raise CheckpointError(f"{file}: expected a GGUF file, got an empty file")
    data = map_file(file)
    walk = Walk(file, data)
    version = _read_version(walk)
    tensor_count, key_count = walk.u64(), walk.u64()
    walk.expect(24 * tensor_count + 13 * key_count)  # which each takes at the least
    metadata = Metadata(walk, key_count)
    tensors = _read_tensors(walk, tensor_count, _alignment(file, metadata))
    return GGUFHeader(file, version, metadata, tensors, data)


def _read_version(walk: Walk) -> int:
    if (first := bytes(walk.bytes[:64]))[:4] != b"GGUF":
        kind = kind_of(first) or f"one that begins {first[:4]!r}"
        raise CheckpointError(f"{walk.file}: expected a GGUF file, got {kind}")
    walk.skip(4)
    version = walk.u32()
    if version and not version & 0xFFFF:
        raise CheckpointError(
            f"{walk.file}: expected a little-endian GGUF file, got a big-endian one: convert it "
            f"with the gguf package's gguf-convert-endian"
        )
    if version not in (2, 3):
        raise CheckpointError(f"{walk.file}: expected version 2 or 3 of GGUF, got {version}")
    return version


def _alignment(file: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{file}: general.alignment: expected a power of 2, got {alignment!r}"
        )
    return alignment


def _read_tensors(walk: Walk, count: int, alignment: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        tensor = _read_tensor(walk)
        if tensor.name in tensors:
            raise CheckpointError(f"{walk.file}: tensor {tensor.name!r} appears twice")
        if tensor.offset % alignment:
            raise CheckpointError(
                f"{walk.file}: {tensor.name}: expected an offset that is a multiple of "
                f"{alignment}, the alignment, got {tensor.offset}"
            )
        tensors[tensor.name] = tensor
    start = -(-walk.at // alignment) * alignment
    placed = {name: replace(t, offset=start + t.offset) for name, t in tensors.items()}
    _check_places(walk, placed.values())
    return placed


def _read_tensor(walk: Walk) -> TensorInfo:
    """Read what the header says of a tensor, with an offset from the first tensor's place."""
    name = walk.text("the name of a tensor")
    place = f"{walk.file}: {name}"
    if (axes := walk.u32()) > _MOST_AXES:
        raise CheckpointError(f"{place}: expected at most {_MOST_AXES} axes, got {axes}")
    sizes = [walk.u64() for _ in range(axes)]
    kind = walk.u32()
    if kind not in TENSOR_TYPES:
        raise CheckpointError(
            f"{place}: expected floats or blocks of them, got "
            f"{_INTEGERS.get(kind, f'type {kind}')}, which is not known"
        )
    text, block, nbytes = TENSOR_TYPES[kind]
    if (row := sizes[0] if sizes else 1) % block:
        raise CheckpointError(
            f"{place}: expected rows of a multiple of {block} numbers, which are a block of "
            f"{text}, got {row}"
        )
    shape = tuple(reversed(sizes))
    return TensorInfo(
        name=name,
        stored_name=name,
        shape=shape,
        dtype=STORED_DTYPES.get(text, text),
        file=walk.file,
        offset=walk.u64(),
        nbytes=prod(shape) // block * nbytes,
    )


def _check_places(walk: Walk, tensors: Iterable[TensorInfo]) -> None:
    """Raise unless tensors lie within the file, apart from each other."""
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for tensor in ordered:
        if (end := tensor.offset + tensor.nbytes) > len(walk.bytes):
            raise CheckpointError(
                f"{walk.file}: expected a GGUF file of {end} bytes or more, where "
                f"{tensor.name} ends, got {len(walk.bytes)}"
            )
    for before, after in pairwise(ordered):
        if after.offset < before.offset + before.nbytes:
            raise CheckpointError(f"{walk.file}: {after.name} overlaps {before.name}")
