"""Directories that appear whole or not at all: a temporary name, then a rename."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_layers.errors import CheckpointError


@contextmanager
def new_checkpoint_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that takes the name of the path if the block ends well.

    Something is overwritten only if it is a checkpoint, so that a wrong path costs no other files.
    """
    if path.exists():
        if not overwrite:
            raise CheckpointError(f"{path} exists; pass overwrite=True to replace it")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} exists and holds no config.json, so it is left alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _sibling(path), _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        if overwrite and path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError as error:
            if old.exists():
                old.rename(path)
            raise CheckpointError(f"{path} cannot be written: {error}") from None
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _sibling(path: Path) -> Path:
    """A new hidden name in the directory of a path: a rename to the path stays on one disk."""
    return path.resolve().parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
