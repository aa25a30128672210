"""Arrays in NumPy's files."""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np

from llama_layers.errors import TraceError
from llama_layers.files.json_files import read_json_if_there
from llama_layers.verify.npy import read_header
from llama_layers.verify.stored import TOKENS, ArrayInfo, StoredArray

# An .npy file knows no bfloat16: its bits come as uint16, under a name that ends so.
_BFLOAT16 = ".bfloat16"
# A member of an .npz file may unpack to this many bytes, or this many times its own.
# Activations deflate to a half or a tenth; only zeros to less.
_UNPACKED, _RATIO = 2**24, 100
# Bytes that are unpacked at a time.
_CHUNK = 2**20
# The exceptions of the zipfile module for a damaged archive.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    EOFError,
    RuntimeError,
    OverflowError,
    IndexError,
)


def open_arrays(place: Path) -> tuple[dict[str, StoredArray], dict[str, str]]:
    """Open .npy and .npz files: their arrays, each read when it is used, and their metadata."""
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such file")
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    found: dict[str, _Array] = {}
    for file in files:
        for array in _members(file):
            name = array.name
            if name in found:
                raise TraceError(f"{file}: {name!r} is in {found[name].file.name} already")
            found[name] = array
    if not found.keys() - TOKENS:
        names = ", ".join(file.name for file in files[:3]) or "an empty directory"
        raise TraceError(f"{place}: expected arrays in .npy or .npz files, got none, but {names}")
    stored = {name: StoredArray(array.info, array.read) for name, array in found.items()}
    return stored, _metadata(place / "metadata.json")


def _members(file: Path) -> Iterator[_Array]:
    """Yield the arrays in a file, their headers read."""
    if file.suffix == ".npy":
        yield _Array(file)
    elif file.suffix == ".npz":
        with _archive(file) as archive:
            members = archive.infolist()
            for member in members:
                yield _Member(file, archive, member)


@contextmanager
def _archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz file; raise TraceError for whatever is wrong in it."""
    if not file.is_file():
        raise TraceError(f"{file}: expected an .npz file, got no regular file")
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except TraceError:
        raise
    except (*_DAMAGED, OSError) as error:
        raise TraceError(f"{file}: expected an .npz file: {error}") from None


class _Array:
    """An array in an .npy file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._said = str(file)
        self._set_name(file.stem)
        if not file.is_file():
            raise self._error("got no regular file")
        with file.open("rb") as opened:
            self._set_header(opened)
        if self._header.start + self._header.nbytes > file.stat().st_size:
            raise self._error(f"got a file that is cut off: {file.stat().st_size} bytes")

    def _set_name(self, name: str) -> None:
        self.name = name.removesuffix(_BFLOAT16)
        self._is_bfloat16 = name.endswith(_BFLOAT16)

    def _set_header(self, opened: IO[bytes]) -> None:
        try:
            self._header = read_header(opened)
        except ValueError as error:
            raise self._error(str(error)) from None

    def info(self) -> ArrayInfo:
        """Return the shape and the dtype of the array."""
        header = self._header
        is_bfloat16 = self._is_bfloat16 or header.dtype.kind == "V"
        return ArrayInfo(header.shape, "bfloat16" if is_bfloat16 else header.dtype.name)

    def read(self) -> np.ndarray:
        """Read the array, in the byte order of the machine."""
        array = self._numbers()
        # NumPy writes the bfloat16 of ml_dtypes as a dtype of two bytes without meaning.
        if self._is_bfloat16 or array.dtype.kind == "V":
            if array.dtype.kind != "V" and array.dtype.newbyteorder("=") != np.uint16:
                raise TraceError(
                    f"{self.file}: expected the bits of bfloat16 numbers as uint16, "
                    f"got {array.dtype}"
                )
            bits = array.view(array.dtype.newbyteorder("=") if array.dtype.kind == "u" else "u2")
            swapped = array.dtype.kind == "u" and not array.dtype.isnative
            return (bits.byteswap() if swapped else bits).view(ml_dtypes.bfloat16)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))

    def _numbers(self) -> np.ndarray:
        """Read the array as it is stored."""
        header = self._header
        if not header.nbytes:  # which cannot be mapped
            return self._shaped(np.empty(0, header.dtype))
        try:
            return np.memmap(self.file, header.dtype, "r", header.start, header.shape, header.order)
        except (ValueError, OSError) as error:  # another file since
            raise self._error(str(error)) from None

    def _shaped(self, numbers: np.ndarray) -> np.ndarray:
        try:
            return numbers.reshape(self._header.shape, order=self._header.order)
        except ValueError as error:  # no numbers along axes that are too long
            raise self._error(str(error)) from None

    def _error(self, reason: str) -> TraceError:
        return TraceError(f"{self._said}: expected an array of numbers: {reason}")


class _Member(_Array):
    """An array in an .npz file."""

    def __init__(self, file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
        self.file = file
        self._said = f"{file}, {member.filename}"
        self._set_name(member.filename.removesuffix(".npy"))
        self._check(member)
        self._member = member
        with self._opened(archive) as opened:
            self._set_header(opened)
        if self._header.start + self._header.nbytes > member.file_size:
            raise self._error(f"got a member that is cut off: {member.file_size} bytes")

    def _check(self, member: zipfile.ZipInfo) -> None:
        """Raise unless NumPy writes such members, and this one unpacks to a sensible size."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._error(
                f"got compression {member.compress_type}; NumPy stores (0) or deflates (8)"
            )
        if member.flag_bits & 1:
            raise self._error("got an encrypted member")
        packed = min(member.compress_size, self.file.stat().st_size)
        if member.file_size > max(_UNPACKED, _RATIO * packed):
            raise self._error(
                f"got {member.file_size} bytes packed in {packed}; at most {_RATIO} times the "
                f"packed size is read, or {_UNPACKED >> 20} MiB"
            )

    @contextmanager
    def _opened(self, archive: zipfile.ZipFile) -> Iterator[IO[bytes]]:
        try:
            with archive.open(self._member) as opened:
                yield opened
        except TraceError:
            raise
        except (*_DAMAGED, OSError) as error:
            raise self._error(str(error)) from None

    def _numbers(self) -> np.ndarray:
        numbers = np.empty(math.prod(self._header.shape), self._header.dtype)
        space = numbers.view(np.uint8)
        with _archive(self.file) as archive, self._opened(archive) as opened:
            opened.read(self._header.start)
            filled = 0
            while filled < len(space) and (part := opened.read(min(_CHUNK, len(space) - filled))):
                space[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
                filled += len(part)
        if filled < len(space):
            raise self._error(f"got {filled} bytes of numbers, expected {len(space)}")
        return self._shaped(numbers)


def _metadata(file: Path) -> dict[str, str]:
    content = read_json_if_there(file, TraceError)
    if isinstance(content.get("config"), dict):
        content["config"] = json.dumps(content["config"])
    for key, value in content.items():
        if not isinstance(value, str):
            raise TraceError(f"{file}: expected a text for {key}, got {value!r}")
    return content
