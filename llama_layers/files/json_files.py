"""Read objects from JSON files, with a message for each way to fail."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_layers.files.kinds import kind_of


def read_json(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Read the object in a JSON file; raise `error`, naming the file, if there is none in it."""
    raw = path.read_bytes()
    if (kind := kind_of(raw[:64])) is not None:
        raise error(f"{path}: expected a JSON object, got {kind}")
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise error(
            f"{path}: expected UTF-8, got byte {raw[problem.start]} at {problem.start}"
        ) from None
    except RecursionError:
        raise error(f"{path}: expected a JSON object, got one nested too deeply") from None
    except ValueError as problem:  # json.JSONDecodeError, or an integer of thousands of digits
        raise error(f"{path}: expected a JSON object: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_json_if_there(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Read the object in a JSON file; give an empty one if the file does not exist."""
    return read_json(path, error) if path.is_file() else {}


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs, for ``object_pairs_hook``; a ValueError if a key comes twice.

    Python's reader takes the last of the two, and other readers the first.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"{twice!r} appears twice")
    return found


class JsonFile(Mapping[str, Any]):
    """The object in a JSON file, read and checked when it is first used, and not before."""

    def __init__(
        self, path: Path, error: type[ValueError], check: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._path, self._error, self._check = path.absolute(), error, check

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    @cached_property
    def _content(self) -> dict[str, Any]:
        content = read_json(self._path, self._error)
        self._check(content)
        return content
