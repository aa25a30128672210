"""Traces in NumPy's files."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llama_layers.errors import TraceError
from llama_layers.verify.trace import TOKENS, Trace

# An .npy file knows no bfloat16: its bits come as uint16, under a name that ends so.
_BFLOAT16 = ".bfloat16"


def read_arrays(path: str | os.PathLike[str], /) -> Trace:
    """Open .npy and .npz files; each array is read when it is used.

    Parameters
    ----------
    path : str or path
        An .npz file, or a directory of .npy and .npz files (others in it are left alone). The name
        of an array is that of its .npy file, or its name inside an .npz file: a site's, in any
        scheme that `Trace` knows, or ``input_ids``, ``positions`` or ``attention_mask``. Where it
        ends in ".bfloat16" the array holds the bits of bfloat16 numbers as uint16. A directory may
        hold a ``metadata.json``: an object of texts, except for "config", which may be an object.

    Returns
    -------
    Trace
        What the files hold. Nothing pickled is read.

    Raises
    ------
    TraceError
        If a file is malformed or holds Python objects, two arrays have one name, or none is there.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> import numpy as np, pathlib, tempfile
    >>> from llama_layers.verify.recorders import read_arrays
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     for name in ("attn_norm-0", "l_out-0"):
    ...         np.save(pathlib.Path(directory, name), np.ones((3, 8), np.float32))
    ...     sorted(read_arrays(directory).arrays)
    ['model.layers.0', 'model.layers.0.input_layernorm']
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such file")
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    stored: dict[str, _Stored] = {}
    for file in files:
        for name, member in _members(file):
            array = _Stored(file, member, name.endswith(_BFLOAT16))
            plain = name.removesuffix(_BFLOAT16)
            if plain in stored:
                raise TraceError(f"{file}: {plain!r} is in {stored[plain].file.name} already")
            stored[plain] = array
    tokens = {name: stored.pop(name).read() for name in TOKENS if name in stored}
    if not stored:
        found = ", ".join(file.name for file in files[:3]) or "an empty directory"
        raise TraceError(f"{place}: expected arrays in .npy or .npz files, got none, but {found}")
    try:
        return Trace(_Lazy(stored), **tokens, metadata=_metadata(place / "metadata.json"))
    except TraceError as error:
        raise TraceError(f"{place}: {error}") from None


def _members(file: Path) -> Iterator[tuple[str, str | None]]:
    """The names of the arrays in a file, and their names in an archive."""
    if file.suffix == ".npy":
        _Stored(file, None, False).read()  # maps it: a file that is cut short is found here
        yield file.stem, None
    elif file.suffix == ".npz":
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile as error:
            raise TraceError(f"{file}: expected an .npz file: {error}") from None
        for name in names:
            yield name.removesuffix(".npy"), name


class _Stored:
    """An array in a file."""

    def __init__(self, file: Path, member: str | None, is_bfloat16: bool) -> None:
        self.file = file
        self._member = member
        self._is_bfloat16 = is_bfloat16

    def read(self) -> NDArray[Any]:
        try:
            array = self._load()
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            within = "" if self._member is None else f", {self._member}"
            # What NumPy says then is how to load Python objects, from a file that may have none.
            reason = "got no .npy file of numbers" if "pickle" in str(error) else str(error)
            raise TraceError(
                f"{self.file}{within}: expected an array of numbers: {reason}"
            ) from None
        # What NumPy writes for the bfloat16 of ml_dtypes has a dtype of two bytes without meaning.
        if self._is_bfloat16 or array.dtype == "V2":
            if array.dtype not in ("V2", np.uint16):
                raise TraceError(
                    f"{self.file}: expected the bits of bfloat16 numbers as uint16, "
                    f"got {array.dtype}"
                )
            array = array.view(ml_dtypes.bfloat16)
        return array

    def _load(self) -> NDArray[Any]:
        if self._member is None:
            mapped: NDArray[Any] = np.load(self.file, mmap_mode="r", allow_pickle=False)
            return mapped
        with zipfile.ZipFile(self.file) as archive, archive.open(self._member) as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)


class _Lazy(Mapping[str, Any]):
    """Arrays of files, each read when it is used."""

    def __init__(self, stored: Mapping[str, _Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _metadata(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TraceError(f"expected a JSON file metadata.json, got {error}") from None
    if not isinstance(content, dict):
        raise TraceError(f"metadata.json: expected a JSON object, got {type(content).__name__}")
    if isinstance(content.get("config"), dict):
        content["config"] = json.dumps(content["config"])
    for key, value in content.items():
        if not isinstance(value, str):
            raise TraceError(f"metadata.json: expected a text for {key}, got {value!r}")
    return content
