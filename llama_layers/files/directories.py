"""Directories that appear whole or not at all: a temporary name, then a rename."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llama_layers.errors import CheckpointError
from llama_layers.files.output import errors_naming

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# Ends the names of what is temporary, so that nobody's own directory is taken for it.
_SUFFIX = ".llama-layers"


@contextmanager
def new_directory(path: Path, check_replacement: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary directory that takes the name of the path if the block ends well.

    If a directory has that name by then, `check_replacement` gets the new one and may raise.
    """
    with temporary_directory(path.parent, path.name) as temporary:
        new = temporary / "new"
        with errors_naming(path, temporary):
            new.mkdir()
            yield new
        if path.exists():
            check_replacement(new)
        _exchange(path, new)


@contextmanager
def temporary_directory(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden directory that goes away with the block, or after its process was killed.

    It is locked while the block runs, and the system drops the lock of a process that ends. So
    one for the same name without a lock was abandoned, and is removed here.
    """
    ours = re.compile(re.escape(f".{name}.") + r"[0-9a-f]{8}" + re.escape(_SUFFIX))
    for entry in list(parent.iterdir()):
        if ours.fullmatch(entry.name):
            with _locked(entry) as locked:
                if locked:
                    shutil.rmtree(entry, ignore_errors=True)
    path = parent / f".{name}.{secrets.token_hex(4)}{_SUFFIX}"
    path.mkdir()
    try:
        with _locked(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def finish_exchange(path: Path) -> None:
    """Finish the exchange of a directory for a new one that a process began before it was killed.

    Where the new one is not in place yet, the old one comes back.
    """
    old = _old(path)
    if not old.exists():
        return
    with _locked(old) as locked:
        if locked and path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif locked:
            old.rename(path)


def _exchange(path: Path, new: Path) -> None:
    """Rename a directory to the path, and remove what had the name."""
    old = _old(path)
    try:
        if not path.exists():
            new.rename(path)
            return
        with _locked(path):
            path.rename(old)
            try:
                new.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from None


def _old(path: Path) -> Path:
    """The name under which a directory waits while another one takes its own."""
    return path.parent / f".{path.name}.old{_SUFFIX}"


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Lock a directory against other processes; False where that fails, and on Windows."""
    with ExitStack() as closing:
        locked = False
        with suppress(OSError):  # another process has the lock, or it is gone, or a symbolic link
            if fcntl is not None:
                handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                closing.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
        yield locked
