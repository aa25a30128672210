"""A checkpoint whose headers have been read and checked, and whose tensors have not."""

from __future__ import annotations

import hashlib
import mmap
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.stored_numbers import (
    NUMPY_DTYPES,
    cast,
    equal_bytes,
    read_only,
    viewed,
)
from llama_layers.checkpoint.tokenizer import Tokenizer
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import CheckpointError
from llama_layers.model.padding import padding
from llama_layers.model.rope_rows import unpermute_rope_rows
from llama_layers.model.tensor_names import EMBEDDING, HEAD, TABLES, expected_tensors
from llama_layers.model.weight_checks import is_inert, misfit

# In how many places of a tensor, and how many bytes of each, tell it from others.
_SAMPLES, _SAMPLE = 4, 64


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in a file, and how it is stored there.

    Attributes
    ----------
    name : str
        Its Hugging Face name.
    stored_name : str
        Its name in the file.
    shape : tuple of int
        As Hugging Face has it, [out, in] for a matrix.
    dtype : str
        "float32", "bfloat16", "float16", "float64", or the name of a GGUF block format ("Q4_1"),
        which is read as float32.
    file : Path
        The file it is in.
    offset, nbytes : int
        The bytes that it takes there.
    permuted_heads : int or None
        The number of heads whose rows the file permutes for RoPE; None where rows are in order.
    permuted_rows : int
        The number of rows of a head that it permutes, the first ones.
    padding : int
        Rows that follow in the file, and belong to no token.
    """

    name: str
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int
    permuted_heads: int | None = None
    permuted_rows: int = 0
    padding: int = 0

    @property
    def read_dtype(self) -> str:
        """The dtype of the array that `Checkpoint.read` gives."""
        return self.dtype if self.dtype in NUMPY_DTYPES else "float32"

    @property
    def rows_at_once(self) -> int:
        """The number of rows that must be read together, since they are permuted."""
        return 1 if self.permuted_heads is None else self.shape[0] // self.permuted_heads

    def first_rows(self, count: int) -> TensorInfo:
        """The tensor without the rows after the first, which are padding; itself if it has none."""
        more = padding(self.shape[0], count) if len(self.shape) == 2 else 0
        return replace(self.rows(self.name, 0, count), padding=more) if more else self

    def rows(self, name: str, start: int, stop: int) -> TensorInfo:
        """Some rows of the tensor, as one of that name."""
        row = self.nbytes // self.shape[0]
        return replace(
            self,
            name=name,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row,
            nbytes=(stop - start) * row,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint(ABC):
    """A checkpoint: what it holds, known from its headers, and a way to read that.

    Attributes
    ----------
    path : Path
        The directory or file it was opened from.
    format : str
        "Hugging Face directory", "safetensors file" or "GGUF file"; with ", Meta names" if the
        tensors have those.
    config : LlamaConfig
        Its config.
    tensors : Mapping of str to TensorInfo
        By Hugging Face name, in the order of `expected_tensors`: exactly those. Embedding and head
        are without rows beyond ``vocab_size``, which are padding.
    maps : Mapping of Path to Array
        The bytes of each file, which are read as they are used.
    chat_template : str, mapping of str to str, or None
        The Jinja template of its chat format, or several by name.
    generation_config : Mapping of str to Any
        The authors' settings for `generate`: the content of generation_config.json, or those in
        the metadata of a GGUF file.
    ignored_keys : tuple of str
        Keys of its config that change no number of a forward pass and were not read.
    ignored_tensors : tuple of str
        Names in the file of tensors that change no number: buffers of RoPE, scales of 8-bit
        caches, and a head that is the embedding again.
    place : Path
        `path` from the root, which the working directory does not change.

    Raises
    ------
    CheckpointError
        If the tensors do not match the config.
    """

    path: Path
    format: str
    config: LlamaConfig
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    maps: Mapping[Path, NDArray[np.uint8]] = field(repr=False)
    chat_template: str | Mapping[str, str] | None = field(repr=False)
    generation_config: Mapping[str, Any] = field(repr=False)
    ignored_keys: tuple[str, ...]
    ignored_tensors: tuple[str, ...] = field(init=False)
    place: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights = self._weights()
        stored = self.tensors.items()
        ignored = tuple(info.stored_name for name, info in stored if name not in weights)
        object.__setattr__(self, "tensors", weights)  # since the dataclass is frozen
        object.__setattr__(self, "ignored_tensors", ignored)
        object.__setattr__(self, "place", self.path.absolute())

    def __deepcopy__(self, memo: object) -> Checkpoint:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (type(self), self.place, self._digest())

    def _digest(self) -> str:
        """Config and tensors, with a few numbers of each, as a text that differs if they do."""
        said = f"{self.config!r} {self.samples()}"
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def samples(self) -> dict[str, str]:
        """Describe each tensor by some of its numbers: others are described otherwise.

        Returns
        -------
        dict of str to str
            By name, the dtype, the shape, and a CRC-32: of all numbers of a vector, and of those in
            four places of a matrix, from its first to its last.
        """
        found = {}
        for name, info in self.tensors.items():
            raw, check = self._bytes(info), 0
            size = info.nbytes if len(info.shape) == 1 else min(_SAMPLE, info.nbytes)
            last = info.nbytes - size
            for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
                check = zlib.crc32(raw[start : start + size].tobytes(), check)
            found[name] = f"{info.dtype} in {list(info.shape)} with CRC-32 {check:08x} of samples"
        return found

    @classmethod
    @abstractmethod
    def opened(cls, path: Path) -> Checkpoint:
        """Open the checkpoint of this format at a path.

        Parameters
        ----------
        path : Path
            The `path` of a checkpoint of this class.

        Returns
        -------
        Checkpoint
            As `open_checkpoint` opens it.
        """

    @abstractmethod
    def open_tokenizer(self) -> Tokenizer:
        """Open the tokenizer that came with the weights.

        Returns
        -------
        Tokenizer
            Text to ids and back.

        Raises
        ------
        CheckpointError
            If there is none, or none that is known to be read correctly.
        ImportError
            If the package ``tokenizers`` is not installed.
        """

    @abstractmethod
    def companions(self) -> Mapping[str, bytes]:
        """The files, other than config and weights, that a Hugging Face directory should have.

        Returns
        -------
        Mapping of str to bytes
            Their names and contents, above all those of the tokenizer.
        """

    def files(self) -> set[Path]:
        """The files that the checkpoint is read from, whether they are there or not.

        Returns
        -------
        set of Path
            Those of the weights, the config and the tokenizer.
        """
        return set(self.maps)

    def read(self, name: str, /, dtype: str | None = None) -> np.ndarray:
        """Read a tensor.

        Parameters
        ----------
        name : str
            A key of `tensors`.
        dtype : str, optional
            A dtype to round or widen the numbers to; the `read_dtype` of the tensor if not given.

        Returns
        -------
        Array
            An array of the tensor's shape, read-only. Where the file holds the numbers as they
            are, a view of the file, which costs nothing until it is used.

        Raises
        ------
        KeyError
            If there is no such tensor.
        CheckpointError
            If a finite number is too large for `dtype`.
        """
        return self.read_part(name, 0, self.tensors[name].shape[0], dtype)

    def read_part(
        self, name: str, start: int, stop: int, /, dtype: str | None = None
    ) -> np.ndarray:
        """Read some rows of a tensor.

        Parameters
        ----------
        name : str
            A key of `tensors`.
        start, stop : int
            The first row, and the one after the last: multiples of `TensorInfo.rows_at_once`.
        dtype : str, optional
            As `read` takes it.

        Returns
        -------
        Array
            Those rows of what `read` gives.
        """
        info = self.tensors[name]
        row = info.nbytes // info.shape[0]
        raw = self._bytes(info)[start * row : stop * row]
        shape = (stop - start, *info.shape[1:])
        if info.dtype in NUMPY_DTYPES:
            array = viewed(raw, info.dtype, shape)
        else:
            gguf = require("gguf", "reading GGUF")
            kind = gguf.GGMLQuantizationType[info.dtype]
            rows = raw.reshape(gguf.quant_shape_to_byte_shape(shape, kind))
            with np.errstate(all="ignore"):  # a file may hold scales of Inf and NaN
                array = gguf.dequantize(rows, kind)
        if info.permuted_heads is not None:
            heads = (stop - start) // info.rows_at_once
            array = unpermute_rope_rows(array, heads, info.permuted_rows)
        return read_only(array if dtype is None else cast(name, array, dtype))

    def read_rows(self, names: Sequence[str], /, dtype: str | None = None) -> np.ndarray:
        """Read tensors as one, their rows below each other.

        Parameters
        ----------
        names : sequence of str
            Keys of `tensors` that agree in all but the first axis, and in dtype if none is given.
        dtype : str, optional
            As `read` takes it.

        Returns
        -------
        Array
            Read-only; one view where the file holds the tensors one right after the other in the
            dtype wanted, a copy otherwise.
        """
        if len(names) == 1:
            return self.read(names[0], dtype)
        infos = [self.tensors[name] for name in names]
        first = infos[0]
        if not _adjacent(infos) or dtype not in (None, first.dtype):
            return read_only(np.concatenate([self.read(name, dtype) for name in names]))
        raw = self.maps[first.file][first.offset : infos[-1].offset + infos[-1].nbytes]
        shape = (sum(info.shape[0] for info in infos), *first.shape[1:])
        return read_only(viewed(raw, first.dtype, shape))

    def forget(self, name: str, /) -> None:
        """Free the memory that reading a tensor took; reading it again takes it again.

        Parameters
        ----------
        name : str
            A key of `tensors`.
        """
        info = self.tensors[name]
        view: Any = self.maps[info.file].base
        mapped = view.obj
        if hasattr(mapped, "madvise"):  # not on Windows
            start = info.offset - info.offset % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def _weights(self) -> dict[str, TensorInfo]:
        """The tensors of the config, in its order; a CheckpointError if the file differs."""
        found = {name: info for name, info in self.tensors.items() if not is_inert(name)}
        for name in found.keys() & TABLES:
            found[name] = found[name].first_rows(self.config.vocab_size)
        if self.config.tie_word_embeddings and HEAD in found:
            self._check_tied_head(found.pop(HEAD), found.get(EMBEDDING))
        shapes = {name: info.shape for name, info in found.items()}
        stored_names = {name: info.stored_name for name, info in found.items()}
        if difference := misfit(shapes, self.config, stored_names):
            raise CheckpointError(f"{self.path}: the tensors do not match the config: {difference}")
        return {name: found[name] for name in expected_tensors(self.config)}

    def _check_tied_head(self, head: TensorInfo, table: TensorInfo | None) -> None:
        """Accept a head that the config ties to the embedding only if it is the embedding."""
        if table is not None and not (
            (head.shape, head.dtype) == (table.shape, table.dtype)
            and equal_bytes(self._bytes(head), self._bytes(table))
        ):
            raise CheckpointError(
                f"{self.path}: {head.stored_name} differs from {table.stored_name}, "
                f"and the config says tie_word_embeddings = true"
            )

    def _bytes(self, info: TensorInfo) -> NDArray[np.uint8]:
        return self.maps[info.file][info.offset : info.offset + info.nbytes]


def _opened_again(kind: type[Checkpoint], place: Path, digest: str) -> Checkpoint:
    """A checkpoint from its pickle, which has its path only; the files must be the same still."""
    if not place.exists():
        raise CheckpointError(
            f"{place}: no such file or directory; a model that was loaded is pickled as its path, "
            f"and read there again"
        )
    checkpoint = kind.opened(place)
    if checkpoint._digest() != digest:
        raise CheckpointError(
            f"{place} has changed since the model was pickled, which keeps its path only: load the "
            f"model again"
        )
    return checkpoint


def _adjacent(infos: Sequence[TensorInfo]) -> bool:
    """Whether tensors lie in one file, in this order, without a gap, and as they are."""
    return all(
        info.dtype in NUMPY_DTYPES and info.permuted_heads is None for info in infos
    ) and all(
        (before.file, before.dtype, before.offset + before.nbytes)
        == (after.file, after.dtype, after.offset)
        for before, after in pairwise(infos)
    )
