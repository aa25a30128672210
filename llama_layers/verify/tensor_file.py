"""Safetensors files that hold a trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # safetensors needs it to know bfloat16
from safetensors import SafetensorError, safe_open

from llama_layers.errors import TraceError
from llama_layers.files.json_files import without_duplicates
from llama_layers.verify.stored import ArrayInfo, StoredArrays

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


class TensorFile(StoredArrays):
    """The tensors of a safetensors file, each read when it is used."""

    def __init__(self, file: Path) -> None:
        self._file = file
        if not file.is_file():
            raise TraceError(f"{file}: expected a safetensors file, got no regular file")
        try:
            opened: Any = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise TraceError(f"{file}: expected a safetensors file{_found(file, error)}") from None
        _check_names(file)
        self._opened = opened
        self._names = frozenset(opened.keys())
        self.metadata: dict[str, str] = opened.metadata() or {}

    def info(self, name: str) -> ArrayInfo:
        """The shape and the dtype of a tensor."""
        stored = self._opened.get_slice(name)
        dtype = stored.get_dtype()
        return ArrayInfo(tuple(stored.get_shape()), _DTYPES.get(dtype, dtype))

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        dtype = self.info(name).dtype
        if dtype not in STORED:
            raise TraceError(
                f"{self._file}: {name}: expected one of the dtypes {', '.join(_DTYPES)}, got "
                f"{dtype}"
            )
        return self._opened.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.keys())

    def __len__(self) -> int:
        return len(self._names)


def _check_names(file: Path) -> None:
    """Refuse a header in which two tensors have one name; the package takes the last of them."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
    try:
        json.loads(header, object_pairs_hook=without_duplicates)
    except ValueError as error:
        raise TraceError(f"{file}: expected each name once in the header: {error}") from None


def _found(file: Path, error: Exception) -> str:
    """What is there instead of a safetensors file, which begins with the length of its header."""
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
