"""Safetensors files that hold a trace."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # safetensors needs it to know bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from llama_layers.errors import TraceError
from llama_layers.files.json_files import without_duplicates
from llama_layers.verify.stored import ArrayInfo, StoredArray

# The dtypes that are read, in the format's words and in ours.
_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint"))
       for bits in (8, 16, 32, 64)},
}  # fmt: skip
STORED = frozenset(_DTYPES.values())


def open_tensors(file: Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Open a safetensors file: its tensors, each read when it is used, and its metadata."""
    if not file.is_file():
        raise TraceError(f"{file}: expected a safetensors file, got no regular file")
    try:
        opened: Any = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise TraceError(f"{file}: expected a safetensors file{_found(file, error)}") from None
    _check_names(file)
    stored = {
        name: StoredArray(partial(_info, opened, name), partial(_read, file, opened, name))
        for name in opened.keys()  # noqa: SIM118  # it is not a mapping
    }
    return stored, opened.metadata() or {}


def _info(opened: Any, name: str) -> ArrayInfo:
    tensor = opened.get_slice(name)
    dtype = tensor.get_dtype()
    return ArrayInfo(tuple(tensor.get_shape()), _DTYPES.get(dtype, dtype))


def _read(file: Path, opened: Any, name: str) -> np.ndarray:
    if (dtype := _info(opened, name).dtype) not in STORED:
        raise TraceError(
            f"{file}: {name}: expected one of the dtypes {', '.join(_DTYPES)}, got {dtype}"
        )
    return opened.get_tensor(name)


def _check_names(file: Path) -> None:
    """Raise TraceError if two tensors have one name; the package takes the last of them."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
    try:
        json.loads(header, object_pairs_hook=without_duplicates)
    except ValueError as error:
        raise TraceError(f"{file}: expected each name once in the header: {error}") from None


def _found(file: Path, error: Exception) -> str:
    """Say what was found instead of a safetensors file, which begins with its header's length."""
    if file.suffix == ".npy":
        return ", got an .npy file: name the directory that it is in"
    size = file.stat().st_size
    if not size:
        return ", got an empty file"
    with file.open("rb") as opened:
        start = opened.read(9)
    if start.startswith(b"PK\x03\x04"):
        return ", got a zip archive: an .npz file needs a name that ends in .npz"
    if start.startswith(b"GGUF"):
        return ", got a GGUF file, which holds weights: name it as the model"
    if start[8:] not in (b"", b"{"):
        return ", got a file that does not begin as one"
    length = int.from_bytes(start[:8], "little") + 8
    if size < max(length, 9):
        return f", got one that is cut off: it has {size} bytes, fewer than its header"
    return f": {error}"
