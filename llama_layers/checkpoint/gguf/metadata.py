"""The metadata of a GGUF file, decoded as it is looked up."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from llama_layers.errors import CheckpointError

_U64, _U32 = struct.Struct("<Q"), struct.Struct("<I")
_BOOL, _STRING, _ARRAY = 7, 8, 9
# The types of numbers. A bool is a byte, and true unless it is 0.
_NUMBERS = {
    number: np.dtype(code)
    for number, code in enumerate("u1 i1 <u2 <i2 <u4 <i4 <f4 u1 - - <u8 <i8 <f8".split())
    if code != "-"
}


class Walk:
    """A position in the bytes of a file, which moves over what it reads."""

    def __init__(self, file: Path, data: NDArray[np.uint8]) -> None:
        self.file = file
        self.bytes = data.data
        self.at = 0

    def skip(self, count: int) -> int:
        """Move over some bytes; return where they begin."""
        self.expect(count)
        self.at += count
        return self.at - count

    def expect(self, count: int) -> None:
        """Raise CheckpointError unless there are that many bytes ahead."""
        if count > len(self.bytes) - self.at:
            raise self._end()

    def u32(self) -> int:
        """Read a number of 32 bits."""
        return _U32.unpack_from(self.bytes, self.skip(4))[0]

    def u64(self) -> int:
        """Read a number of 64 bits."""
        return _U64.unpack_from(self.bytes, self.skip(8))[0]

    def text(self, what: str) -> str:
        """Read a string; messages call it `what`."""
        start = self.at
        self.skip(self.u64())
        return decoded_text(self.bytes, start, f"{self.file}: {what}")

    def skip_strings(self, count: int) -> int:
        """Move over some strings, without an object for each; return where they begin."""
        start = at = self.at
        data, length = self.bytes, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + length(data, at)[0]
        except (struct.error, OverflowError):
            raise self._end() from None
        return self.skip(at - start)

    def _end(self) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: expected a GGUF file, got one that ends within its header, after "
            f"{len(self.bytes)} bytes"
        )


class GGUFStrings(Sequence[str]):
    """An array of strings in the bytes of a file, each decoded when it is asked for.

    The first begins with its length at `start`. Messages name the `place`, a file and a key.
    """

    def __init__(self, data: memoryview, start: int, end: int, count: int, place: str) -> None:
        self._data, self._start, self._end = data, start, end
        self._count, self._place = count, place

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (decoded_text(self._data, start, self._place) for start in self._walk())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(self._count)[index]]
        start = int(self._starts[range(self._count)[index]])
        return decoded_text(self._data, start, self._place)

    def positions(self, texts: Iterable[str]) -> dict[str, int]:
        """Find the last position of each text that is there, without decoding the others."""
        raw = bytes(self._data[self._start : self._end])
        found: dict[str, int] = {}
        for text in texts:
            stored = _U64.pack(len(text.encode())) + text.encode()
            at = raw.rfind(stored)
            while at >= 0 and text not in found:
                i = int(np.searchsorted(self._starts, self._start + at))
                if i < self._count and self._starts[i] == self._start + at:
                    found[text] = i
                at = raw.rfind(stored, 0, at + len(stored) - 1)  # the bytes may be within a string
        return found

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.fromiter(self._walk(), np.int64, self._count)

    def _walk(self) -> Iterator[int]:
        """Give the position at which each string begins."""
        at, data, length = self._start, self._data, _U64.unpack_from
        for _ in range(self._count):
            yield at
            at += 8 + length(data, at)[0]


class _Value(NamedTuple):
    """The place of a value."""

    kind: int
    start: int
    end: int
    length: int | None
    """The number of elements of an array; None for a value alone."""


class Metadata(Mapping[str, Any]):
    """The metadata of a GGUF file by key, each value decoded when it is looked up.

    A value is a bool, int, float or str; an array of numbers is a NumPy view of the file, and an
    array of strings a sequence of str. `walk` moves from the first key to the end of the last
    value.
    """

    def __init__(self, walk: Walk, count: int) -> None:
        self._file, self._bytes = walk.file, walk.bytes
        self._values: dict[str, _Value] = {}
        for _ in range(count):
            key = walk.text("a key of the metadata")
            if not key or key in self._values:
                raise CheckpointError(
                    f"{walk.file}: expected different keys in the metadata, got {key!r} "
                    f"{'twice' if key else 'among them'}"
                )
            self._values[key] = _found(walk, key)

    def __getitem__(self, key: str) -> Any:
        kind, start, end, length = self._values[key]
        place = f"{self._file}: {key}"
        if kind == _STRING:
            if length is None:
                return decoded_text(self._bytes, start, place)
            return GGUFStrings(self._bytes, start, end, length, place)
        numbers = np.asarray(self._bytes)[start:end].view(_NUMBERS[kind])
        if kind == _BOOL:
            numbers = numbers != 0
        return numbers.item() if length is None else numbers

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def decoded_text(data: memoryview, start: int, place: str) -> str:
    """Decode the string that begins with its length at `start`; `place` is for messages."""
    end = start + 8 + _U64.unpack_from(data, start)[0]
    try:
        return str(data[start + 8 : end], "utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place}: expected UTF-8 text: {error}") from None


def _found(walk: Walk, key: str) -> _Value:
    """Move over a value; return its place."""
    kind, length = walk.u32(), None
    if kind == _ARRAY:
        kind, length = walk.u32(), walk.u64()
    count = 1 if length is None else length
    if kind == _STRING:
        start = walk.skip_strings(count)
    elif kind in _NUMBERS:
        start = walk.skip(_NUMBERS[kind].itemsize * count)
    else:
        raise CheckpointError(
            f"{walk.file}: {key}: expected a number, a string or an array of them, got "
            f"{'an array of arrays' if kind == _ARRAY else f'type {kind}'}"
        )
    return _Value(kind, start, walk.at, length)


def shown(value: object) -> str:
    """Make a value of the metadata fit into a message."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} numbers, {np.array2string(value, threshold=4)}"
    if isinstance(value, GGUFStrings):
        return f"an array of {len(value)} strings"
    return repr(value)


class Section:
    """The keys of the metadata that begin with a prefix, checked as they are read.

    `error` makes an exception of a message.
    """

    def __init__(
        self, metadata: Mapping[str, Any], prefix: str, error: Callable[[str], ValueError]
    ) -> None:
        self._metadata, self._prefix, self._error = metadata, prefix, error
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._prefix + key in self._metadata

    def get(self, key: str, default: Any = None) -> Any:
        """Read a value of any type."""
        self._read.add(key)
        return self._metadata.get(self._prefix + key, default)

    def unread(self) -> tuple[str, ...]:
        """The keys that were not read, with the prefix."""
        own = (key for key in self._metadata if key.startswith(self._prefix))
        return tuple(key for key in own if key.removeprefix(self._prefix) not in self._read)

    def error(self, key: str, problem: str) -> ValueError:
        """An exception that names a key."""
        return self._error(f"{self._prefix}{key}: {problem}")

    def expect(self, *keys: str) -> None:
        """Raise unless all of some keys are there."""
        if missing := [self._prefix + key for key in keys if key not in self]:
            raise self._error(f"missing {', '.join(missing)}")

    def integer(self, key: str, default: int = 0, expected: str = "an integer") -> int:
        """Read an integer."""
        return self._checked(key, default, int, expected)

    def number(self, key: str, default: float = 0.0) -> float:
        """Read a number."""
        return self._checked(key, default, int | float, "a number")

    def text(self, key: str, default: str) -> str:
        """Read a string."""
        return self._checked(key, default, str, "a string")

    def flag(self, key: str, default: bool) -> bool:
        """Read a switch."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {shown(value)}")
        return value

    def strings(self, key: str) -> Sequence[str]:
        """Read an array of strings, which must be there."""
        self.expect(key)
        value = self.get(key)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.error(key, f"expected an array of strings, got {shown(value)}")
        return value

    def numbers(self, key: str, kind: type) -> np.ndarray | None:
        """Read an array of numbers of a kind; None if it is not there."""
        if key not in self:
            return None
        array = np.asarray(value := self.get(key))
        if array.ndim != 1 or not (np.issubdtype(array.dtype, kind) or not array.size):
            raise self.error(key, f"expected an array of numbers, got {shown(value)}")
        return array

    def _checked(self, key: str, default: Any, kind: Any, expected: str) -> Any:
        value = self.get(key, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(key, f"expected {expected}, got {shown(value)}")
        return value
