"""Files written whole or not at all, and never over another unless asked; JSON that is read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any


def check_output(path: Path | None, force: bool) -> None:
    """Refuse a path that cannot be written to; before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected an existing directory, {path.parent} is none")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a directory")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; force=True overwrites it")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside the path, and rename it when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Read the object in a JSON file; raise `error`, naming the file, where it holds none."""
    raw = path.read_bytes()
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


class JsonFile(Mapping[str, Any]):
    """The object in a JSON file, read when it is first used; one that is not used may be wrong."""

    def __init__(self, path: Path, error: type[ValueError]) -> None:
        self._path, self._error = path, error

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    @cached_property
    def _content(self) -> dict[str, Any]:
        return read_json(self._path, self._error)
