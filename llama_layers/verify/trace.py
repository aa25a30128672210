"""The activations of one forward pass, in a file that any engine can write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # safetensors needs it to know bfloat16
from safetensors import SafetensorError, safe_open

from llama_layers.backends.transfer import to_numpy
from llama_layers.errors import TraceError
from llama_layers.files import check_output, write_tensors
from llama_layers.verify.aliases import canonical_arrays

# Tensors of a trace that are no activations.
TOKENS = ("input_ids", "positions", "attention_mask")


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded activations.

    A run through a cache, in chunks or token by token, is recorded as the whole run would be: its
    arrays are joined along the sequence.

    Attributes
    ----------
    arrays : mapping of str to Array
        For each recorded site its array, in the dtype that the engine computed it in. Names of
        Hugging Face, Meta, TransformerLens and llama.cpp are known, and become those of `sites`.
    input_ids : Array of integers, shape [B, S], or None
        The tokens.
    positions : Array of integers, shape [S] or [B, S], or None
        The position of each token for RoPE; where it is None they are counted from 0, from the
        first token that is no padding.
    attention_mask : Array of bool or of 0 and 1, shape [B, S], or None
        Which tokens are no padding; all if it is None.
    metadata : mapping of str to str
        Where the trace comes from. `check` reads "config" (the content of a config.json), "dtype"
        and "accumulate" (formats that the engine computed in, where the arrays do not show it), and
        "rope_layout" ("interleaved" where the pairs that RoPE turns are next to each other in
        queries and keys, and not half a head apart); the rest is for people.

    Raises
    ------
    TraceError
        If two names mean the same site, or it cannot be told which site a name means.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import Trace
    >>> trace = Trace({"model.norm": np.ones((1, 2, 4), np.float32)}, np.array([[3, 1]]))
    >>> trace.arrays["model.norm"].shape
    (1, 2, 4)
    """

    arrays: Mapping[str, Any]
    input_ids: Any | None = None
    positions: Any | None = None
    attention_mask: Any | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", canonical_arrays(self.arrays))  # frozen

    def save(self, path: str | os.PathLike[str], /, *, force: bool = False) -> None:
        """Write a safetensors file, whole or not at all.

        Parameters
        ----------
        path : str or path
            The file.
        force : bool, optional
            Whether a file that exists may be replaced.

        Raises
        ------
        FileExistsError
            If the file exists, unless `force`.
        FileNotFoundError
            If its directory does not.
        ValueError
            If the name is that of a NumPy file.

        Examples
        --------
        >>> import numpy as np, pathlib, tempfile
        >>> from llama_layers.verify import Trace
        >>> trace = Trace({"model.norm": np.ones((1, 2, 4), np.float32)}, np.array([[3, 1]]))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     file = pathlib.Path(directory, "port.safetensors")
        ...     trace.save(file)
        ...     Trace.load(file).arrays["model.norm"].shape
        (1, 2, 4)
        """
        file = Path(path)
        if file.suffix in (".npy", ".npz"):
            raise ValueError(f"{file}: expected a name for a safetensors file, got {file.suffix}")
        check_output(file, force)
        tokens = {name: getattr(self, name) for name in TOKENS}
        tensors = dict(self.arrays) | {n: a for n, a in tokens.items() if a is not None}
        metadata = {"format": "llama_layers.trace 1"} | dict(self.metadata)
        write_tensors(file, {name: to_numpy(array) for name, array in tensors.items()}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], /) -> Trace:
        """Open a file; each array is read when it is used.

        Parameters
        ----------
        path : str or path
            A safetensors file; or an .npz file, or a directory of .npy and .npz files, as
            `read_arrays` takes them.

        Returns
        -------
        Trace
            What the file holds.

        Raises
        ------
        TraceError
            If it is no whole file of its kind, or two names mean the same site.
        FileNotFoundError
            If there is no such file.
        """
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file")
        if file.is_dir() or file.suffix == ".npz":
            from llama_layers.verify.recorders.array_files import read_arrays  # makes a Trace

            return read_arrays(file)
        try:
            opened: Any = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise TraceError(f"{file}: expected a safetensors file{_found(file, error)}") from None
        stored = _Stored(opened)
        tokens = {name: stored[name] for name in TOKENS if name in stored}
        try:
            return cls(stored.without(TOKENS), **tokens, metadata=opened.metadata() or {})
        except TraceError as error:
            raise TraceError(f"{file}: {error}") from None


def _found(file: Path, error: Exception) -> str:
    """What is in the place of a safetensors file, which begins with the length of its header."""
    if not file.is_file():
        return f": {error}"
    if file.suffix == ".npy":
        return ", got an .npy file: name the directory that it is in"
    size = file.stat().st_size
    if not size:
        return ", got an empty file"
    with file.open("rb") as opened:
        start = opened.read(9)
    if start[8:] not in (b"", b"{"):
        return ", got a file that does not begin as one"
    length = int.from_bytes(start[:8], "little") + 8
    if size < max(length, 9):
        return f", got one that is cut off: it has {size} bytes, fewer than its header"
    return f": {error}"


class _Stored(Mapping[str, Any]):
    """Tensors of an open file, each read when it is used."""

    def __init__(self, opened: Any, hidden: tuple[str, ...] = ()) -> None:
        self._opened = opened
        self._names = tuple(name for name in opened.keys() if name not in hidden)  # noqa: SIM118

    def without(self, names: tuple[str, ...]) -> _Stored:
        return _Stored(self._opened, names)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._opened.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
