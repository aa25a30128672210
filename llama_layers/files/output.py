"""Files to write, whole or not at all, and over another one only if asked; the cache."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Kinds of paths other than a regular file: a rename over one would destroy it.
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


# Errors of a directory that cannot be made, read or written.
_OF_THE_CACHE = {
    getattr(errno, name) for name in "EACCES EPERM EROFS ENOTDIR EEXIST ENOSPC".split()
}


class OverwriteError(FileExistsError):
    """A file is there, and replacing it was not asked for."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} exists; force=True overwrites it")
        self.path = path


def cache_directory() -> Path:
    """The directory of pulled models, and of what was found about faster code on this machine.

    Returns
    -------
    Path
        ``$LLAMA_LAYERS_CACHE`` if that is set; otherwise ``llama_layers`` in ``$XDG_CACHE_HOME``
        or in ``~/.cache``.

    Raises
    ------
    OSError
        If neither is set, and this user has no home directory.
    """
    if own := os.environ.get("LLAMA_LAYERS_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_layers"
    except RuntimeError:
        raise OSError(
            "the cache would be in the home directory, and this user has none: set "
            "LLAMA_LAYERS_CACHE to a directory"
        ) from None


@contextmanager
def using_cache() -> Iterator[None]:
    """Let an OSError of the cache directory name the variable that moves it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_CACHE:
            raise
        reason = f"{error.strerror}; LLAMA_LAYERS_CACHE moves the cache"
        raise OSError(error.errno, reason, error.filename) from None


def check_output(path: Path | None, force: bool) -> None:
    """Raise OSError if a path cannot be written to; before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected {path.parent} to be an existing directory")
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        if path.is_symlink() and not path.resolve().parent.is_dir():
            raise FileNotFoundError(
                f"{path}: expected a link into an existing directory, got {path.resolve()}"
            ) from None
        return
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(f"{path}: expected a file, got a directory")
    if kind != stat.S_IFREG:
        raise OSError(f"{path}: expected a regular file, got {_KINDS.get(kind, 'none')}")
    if not force:
        raise OverwriteError(path)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, and rename it to the path when it is whole.

    If the path is a symbolic link, the file it points to is written. A file that is replaced
    keeps its mode.
    """
    target = Path(os.path.realpath(path))
    with errors_naming(path, target.parent):
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name[:100]}.", suffix=path.suffix
        )
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(_mode(target))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def errors_naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let an OSError name the path where it names no file, or one in a temporary's directory."""
    try:
        yield
    except OSError as error:
        own = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(temporary)
        if error.errno is None or not own:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def _mode(path: Path) -> int:
    """The mode of a file, or what a new one would get."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    return 0o666 & ~mask
