"""Directories that appear whole or not at all: a temporary name, then a rename."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llama_layers.checkpoint.file_names import INDEX, SHARD, SINGLE
from llama_layers.errors import CheckpointError
from llama_layers.files.output import errors_naming

try:
    import fcntl
except ModuleNotFoundError:  # on Windows
    fcntl = None  # type: ignore[assignment]

# Ends the names of what is temporary, so that nobody's own directory is taken for it.
_SUFFIX = ".llama-layers"


@contextmanager
def new_checkpoint_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that takes the name of the path if the block ends well.

    Only a checkpoint is overwritten, and only one that loses no file by it but its weights. What
    a process that was killed left here is put in order first.
    """
    for parent in (path.parent, path.resolve().parent):  # which differ where it is a link
        if not parent.is_dir():
            problem = "is not a directory" if parent.exists() else "does not exist"
            raise CheckpointError(f"{path}: {parent} {problem}")
    path = path.resolve()
    _restore(path)
    if path.exists():
        if not path.is_dir():
            raise CheckpointError(f"{path}: expected a directory to make, got a file")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} exists and holds no config.json, so it is left alone")
        if not overwrite:
            raise CheckpointError(f"{path} exists; pass overwrite=True to replace it")
    with temporary_directory(path.parent, path.name) as temporary:
        new = temporary / "new"
        with errors_naming(path, temporary):
            new.mkdir()
            yield new
        if path.exists():
            _check_nothing_is_lost(path, new)
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


def _restore(path: Path) -> None:
    """Finish an exchange that a process began before it was killed."""
    old = _old(path)
    if not old.exists():
        return
    with _locked(old) as locked:
        if locked and path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif locked:
            old.rename(path)


def _old(path: Path) -> Path:
    """Where a checkpoint waits while another one takes its name."""
    return path.parent / f".{path.name}.old{_SUFFIX}"


def _holds_weights(name: str) -> bool:
    """Whether a file has weights, which those in one file of a new checkpoint replace."""
    return name in (SINGLE, INDEX) or SHARD.fullmatch(name) is not None


def _check_nothing_is_lost(path: Path, replacement: Path) -> None:
    kept = {entry.name for entry in replacement.iterdir()}
    lost = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in kept and not (entry.is_file() and _holds_weights(entry.name))
    )
    if lost:
        raise CheckpointError(
            f"{path} holds {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}, which would "
            f"be lost: choose another directory, or move that away"
        )
