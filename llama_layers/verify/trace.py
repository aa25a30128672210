"""The activations of one forward pass, in a file that any engine can write."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.families import FAMILIES
from llama_layers.errors import TraceError
from llama_layers.files.output import check_output
from llama_layers.files.tensors import write_tensors
from llama_layers.verify.aliases import canonical_arrays
from llama_layers.verify.array_files import open_arrays
from llama_layers.verify.report.recorded import recorded_blocks
from llama_layers.verify.report.template import render
from llama_layers.verify.stored import TOKENS, StoredArray, StoredArrays, info_of
from llama_layers.verify.tensor_file import STORED, open_tensors


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
        first token that is not padding.
    attention_mask : Array of bool or of 0 and 1, shape [B, S], or None
        Which tokens are not padding; all if it is None.
    metadata : mapping of str to str
        Where the trace comes from. `check` reads "config" (the content of a config.json, whose
        ``model_type`` says which family's names the arrays have, Llama's if it is missing), "dtype"
        and "accumulate" (formats that the engine computed in, where the arrays do not show it), and
        "rope_layout" ("interleaved" where the pairs that RoPE rotates are next to each other in
        queries and keys, and not half a head apart), and "temperature" (which the logits were
        divided by before ``logprobs``, 1 by default); the rest is for people.
    next_ids : Array of integers, shape [B, S] or [B], or None
        Only for ``logprobs``: the token after each, or after the last of each sequence. Where it
        is None they are those of `input_ids`, and the one after the last is not known.

    Raises
    ------
    TraceError
        If two names mean the same site, or it cannot be told which site a name means.
    TypeError
        If `arrays` or `metadata` is not a mapping with texts as keys, a value of `metadata` is
        not a text, or the tokens are not arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import Trace
    >>> trace = Trace({"model.norm": np.ones((1, 2, 4), np.float32)}, np.array([[3, 1]]))
    >>> trace.arrays["model.norm"].shape
    (1, 2, 4)
    """

    arrays: Mapping[str, Array]
    input_ids: Array | None = None
    positions: Array | None = None
    attention_mask: Array | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    next_ids: Array | None = None

    def __post_init__(self) -> None:
        _check_texts("arrays", self.arrays, "arrays by name")
        for name in TOKENS:
            given = getattr(self, name)
            if given is not None and not hasattr(given, "dtype"):
                raise TypeError(
                    f"{name}: expected an array of integers, got {type(given).__name__}"
                )
        _check_texts("metadata", self.metadata, "texts by name")
        for key, value in self.metadata.items():
            if not isinstance(value, str):
                raise TypeError(
                    f"metadata {key}: expected a text, got {type(value).__name__}; json.dumps "
                    "makes one"
                )
        arrays = canonical_arrays(self.arrays, _family(self.metadata))
        object.__setattr__(self, "arrays", arrays)  # frozen

    def __repr__(self) -> str:
        facts = [f"arrays: {len(self.arrays)}"]
        if self.input_ids is not None:
            facts.append(f"input_ids: {list(self.input_ids.shape)}")
        if "engine" in self.metadata:
            facts.append(f"engine: {self.metadata['engine']!r}")
        return f"Trace({', '.join(facts)})"

    def _repr_html_(self) -> str:
        """The sites in a notebook, with shapes and dtypes; no array is read."""
        arrays = {name: info_of(self.arrays, name) for name in self.arrays}
        tokens = {name: getattr(self, name) for name in TOKENS}
        given = {name: array for name, array in tokens.items() if array is not None}
        infos = {name: info_of(given, name) for name in given}
        return render("notebook", recorded_blocks(arrays, infos, self.metadata))

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
        OSError
            If it cannot be written, for example because the disk is full.
        ValueError
            If the name is that of a NumPy file, or an array has a name that the format reserves.
        TypeError
            If an array holds other things than integers, bools or the floats of a checkpoint.

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
        if "__metadata__" in tensors:
            raise ValueError("arrays: expected names of arrays, got '__metadata__', which is taken")
        for name in tensors:
            if (dtype := info_of(tensors, name).dtype) not in STORED:
                raise TypeError(f"{name}: expected a dtype such as float32, got {dtype}")
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
            If it is not a whole file of its kind, or two names mean the same site.
        FileNotFoundError
            If there is no such file.
        """
        file = Path(path)
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file")
        is_numpy = file.is_dir() or file.suffix == ".npz"
        return trace_of(file, *(open_arrays if is_numpy else open_tensors)(file))


def with_layout(trace: Trace, layout: str) -> Trace:
    """Return a trace with another RoPE layout in its metadata."""
    return replace(trace, metadata={**trace.metadata, "rope_layout": layout})


def trace_of(file: Path, stored: Mapping[str, StoredArray], metadata: Mapping[str, str]) -> Trace:
    """Make a trace of what a file holds; the file is named in errors."""
    tokens = {name: stored[name].read() for name in TOKENS if name in stored}
    arrays = {name: array for name, array in stored.items() if name not in TOKENS}
    try:
        return Trace(StoredArrays(arrays), **tokens, metadata=metadata)
    except TraceError as error:
        raise TraceError(f"{file}: {error}") from None


def _check_texts(argument: str, given: object, expected: str) -> None:
    """Raise TypeError unless it is a mapping whose keys are texts."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected a mapping of {expected}, got {type(given).__name__}")
    for key in given:
        if not isinstance(key, str):
            raise TypeError(f"{argument}: expected texts for keys, got {type(key).__name__}")


def _family(metadata: Mapping[str, str]) -> str:
    """The family whose names the arrays have, "llama" if nothing tells."""
    try:
        content = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        return "llama"  # whoever reads the config says what is wrong
    family = content.get("model_type") if isinstance(content, dict) else None
    return family if isinstance(family, str) and family in FAMILIES else "llama"
