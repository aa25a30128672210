"""Directories that appear whole or not at all: a temporary name, then a rename."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_layers.errors import CheckpointError

# Weights, which a checkpoint of the same name in one file replaces.
_SHARDS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


@contextmanager
def new_checkpoint_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that takes the name of the path if the block ends well.

    Only a checkpoint is overwritten, and only one that loses no file by it but its weights.
    """
    path = path.resolve()
    if path.exists():
        if not overwrite:
            raise CheckpointError(f"{path} exists; pass overwrite=True to replace it")
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} exists and holds no config.json, so it is left alone")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: expected to be in an existing directory")
    temporary, old = _sibling(path), _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            _check_nothing_is_lost(path, temporary)
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


def _check_nothing_is_lost(path: Path, replacement: Path) -> None:
    kept = {entry.name for entry in replacement.iterdir()}
    lost = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in kept and not (entry.is_file() and _SHARDS.fullmatch(entry.name))
    )
    if lost:
        raise CheckpointError(
            f"{path} holds {', '.join(lost[:4])}{', ...' if len(lost) > 4 else ''}, which would "
            f"be lost: choose another directory, or move that away"
        )


def _sibling(path: Path) -> Path:
    """A new hidden name in the directory of a path: a rename to the path stays on one disk."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
