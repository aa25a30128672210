"""From a path to the weights of a model, each read when it is first used."""

from __future__ import annotations

import importlib
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_layers.arrays.types import Array, Device, DType, Namespace
from llama_layers.backends.cupy.upload import Part, Source, upload
from llama_layers.backends.placement import cupy_device, is_cupy, placement
from llama_layers.checkpoint.checkpoint import Checkpoint
from llama_layers.checkpoint.open import open_checkpoint
from llama_layers.checkpoint.stored_numbers import NUMPY_DTYPES, checked_dtype
from llama_layers.errors import CheckpointError
from llama_layers.files.progress import progress
from llama_layers.layers.group import Group
from llama_layers.layers.tensors import Names
from llama_layers.model.llama import Llama
from llama_layers.model.tensor_names import layer_arrays
from llama_layers.model.weight_checks import unfusible
from llama_layers.model.weights import LlamaWeights
from llama_layers.parallel.connect import check_same, connect
from llama_layers.parallel.plan import Shard

if TYPE_CHECKING:
    from mpi4py import MPI

# Bytes that a thread reads at a time on their way to a GPU, where rows are not larger.
PART = 4 << 20

# A function that gives some tensors of a checkpoint as one array.
_Read = Callable[[Names], Array]


def load(
    path: str | os.PathLike[str],
    /,
    *,
    backend: Literal["numpy", "cupy"] | Namespace = "numpy",
    dtype: str | DType | None = None,
    device: Device | None = None,
    layers: Iterable[int] | None = None,
    parallel: MPI.Comm | Group | None = None,
) -> Llama:
    """Load a model.

    Everything is checked at once, from the headers; a weight is read when it is first used, and
    then kept. On NumPy, weights that the file holds as they are needed stay views of the file, and
    all are read-only. On CuPy, all are copied to the GPU at once, in parts, so that main memory
    holds few of them.

    Parameters
    ----------
    path : str or path
        A Hugging Face directory (one safetensors file, or shards with an index), a .safetensors
        file with config.json beside it, a .gguf file, the name of a known model, or that of a
        model on the Hugging Face Hub: "org/name", "org/name/file.gguf", each with "@revision" if
        one is wanted. A path that exists comes first, then the Hub's cache on this computer; only
        what is not there is downloaded, and only the files that are needed.
    backend : {"numpy", "cupy"} or module
        The library of the arrays. A module is the namespace of any array API library.
    dtype : str or dtype, optional
        "float16", "bfloat16", "float32" or "float64", to round or widen the weights to. As
        stored, if not given; the block formats of GGUF are then float32.
    device : optional
        The device of the arrays, in the words of the backend: an integer for CuPy.
    layers : iterable of int, optional
        Which layers to load: all, if not given. The others cost nothing, and using one raises
        CheckpointError.
    parallel : mpi4py.MPI.Comm or Group, optional
        Ranks that split the model among them, ``MPI.COMM_WORLD`` for one: each gets some of the
        heads of attention and some of the channels of the MLP of every layer. All of them have to
        make the same calls with the same arguments, and get the same results. On CuPy each rank
        takes a GPU of its computer.

    Returns
    -------
    Llama
        The model, or with `parallel` this rank's part of it.

    Raises
    ------
    CheckpointError
        If there is nothing there, it is malformed, its tensors do not match its config, or a
        number is too large for `dtype` (the last when the weight is first used, or on CuPy at
        once).
    ConfigError
        If the config is incomplete or asks for what is not implemented.
    RuntimeError
        If CuPy is asked for and cannot compute here; it says what is missing.
    MemoryError
        If CuPy is asked for, and the GPU has too little memory for the weights.
    ImportError
        If the file has the block formats of GGUF, and the package ``gguf`` is not installed.
    ValueError
        If `dtype`, `device` or `layers` is out of range.

    Examples
    --------
    >>> from llama_layers import load
    >>> load("smollm2-135m").config.hidden_size  # doctest: +SKIP
    576
    """
    name = None if dtype is None else checked_dtype(dtype)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or path, got {type(path).__name__}")
    if not isinstance(layers, Iterable | None):
        raise TypeError(f"layers: expected an iterable of int, got {type(layers).__name__}")
    group = None if parallel is None else connect(parallel, backend)
    if device is None:
        device = getattr(group, "device", None)
    placement(backend, device)  # a GPU that cannot compute is named before a download
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    chosen = _chosen(layers, config.num_hidden_layers)
    if name is None:
        dtypes = {key: info.read_dtype for key, info in checkpoint.tensors.items()}
        if difference := unfusible(dtypes, chosen, config.model_type):
            raise CheckpointError(f"{checkpoint.path}: {difference}: pass a dtype to load them in")
    shard = None if group is None else _shared(checkpoint, group, name)
    tensors = _Tensors(checkpoint, chosen, name, backend, device, shard)
    if shard is None and is_cupy(backend):
        tensors.upload()
    config = config if shard is None else shard.config
    weights = LlamaWeights.from_named(tensors, config, group=group)
    return Llama(config, weights, checkpoint.open_tokenizer, checkpoint.generation_config)


def _shared(checkpoint: Checkpoint, group: Group, dtype: str | None) -> Shard:
    """What a rank has of a checkpoint; an error unless all ranks load the same one."""
    same = asdict(checkpoint.config) | {"the dtype to load": dtype}
    check_same(group, same | checkpoint.samples())
    for tensor in checkpoint.tensors:
        checkpoint.forget(tensor)
    return Shard(checkpoint.config, group.rank, group.size)


def _chosen(layers: Iterable[int] | None, count: int) -> frozenset[int]:
    if layers is None:
        return frozenset(range(count))
    chosen = set()
    for layer in layers:  # which may be billions: stop at the first that is out of range
        if not 0 <= operator.index(layer) < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer}")
        chosen.add(operator.index(layer))
    return frozenset(chosen)


class _Tensors(Mapping[str, Array]):
    """The tensors of a checkpoint as arrays, read when they are asked for.

    A pickle holds the arguments, with which the files are read again. A deep copy reads the files
    that are mapped already.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: frozenset[int],
        dtype: str | None,
        backend: str | Namespace,
        device: Device | None,
        shard: Shard | None,
    ) -> None:
        self._checkpoint, self._layers, self._dtype = checkpoint, layers, dtype
        self._backend, self._device, self._shard = backend, device, shard
        self._read = self._reader()

    def _reader(self) -> _Read:
        checkpoint, dtype = self._checkpoint, self._dtype
        if self._shard is not None:
            return self._read_parts
        place = placement(self._backend, self._device)
        return lambda names: place(checkpoint.read_rows(names, dtype))

    def upload(self) -> None:
        """Copy all tensors to the GPU now."""
        device = cupy_device(self._device)
        self._read = _uploaded(device, self._checkpoint, self._layers, self._dtype)

    def _read_parts(self, names: Names) -> Array:
        """What a rank has of some tensors; the pages of the file that it needs no more go back."""
        parts = [self._part(name) for name in names]
        place = placement(self._backend, self._device)
        placed = place(parts[0] if len(parts) == 1 else np.concatenate(parts))
        for name in names:
            self._checkpoint.forget(name)
        return placed

    def _part(self, name: str) -> np.ndarray:
        assert self._shard is not None
        whole = self._checkpoint.read(name, self._dtype)
        part: Any = self._shard.part(name, whole)
        in_memory = whole.flags.writeable  # and not in the file
        return part.copy() if in_memory and part is not whole and part.base is not None else part

    def __deepcopy__(self, memo: object) -> _Tensors:
        place = self._backend, self._device, self._shard
        return _Tensors(self._checkpoint, self._layers, self._dtype, *place)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._shard is not None:
            raise TypeError(
                "one rank's part of a model cannot be pickled: let each process load its own"
            )
        backend = self._backend if isinstance(self._backend, str) else self._backend.__name__
        return _tensors_again, (self._checkpoint, self._layers, self._dtype, backend, self._device)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.tensors

    def __getitem__(self, name: str) -> Array:
        return self.rows((name,))

    def rows(self, names: Names) -> Array:
        """Tensors as one array; a CheckpointError if their layer was not asked for."""
        layer = _layer_of(names[0])
        if layer is not None and layer not in self._layers:
            raise CheckpointError(
                f"layer {layer}: not loaded; load(..., layers=...) asked for "
                f"{', '.join(map(str, sorted(self._layers))) or 'none'}"
            )
        return self._read(names)


def _tensors_again(
    checkpoint: Checkpoint,
    layers: frozenset[int],
    dtype: str | None,
    backend: str,
    device: Device | None,
) -> _Tensors:
    """Tensors from their pickle, which has the name of a module instead of it."""
    module = backend if backend in ("numpy", "cupy") else importlib.import_module(backend)
    return _Tensors(checkpoint, layers, dtype, module, device, None)


def _uploaded(
    device: Any, checkpoint: Checkpoint, layers: frozenset[int], dtype: str | None
) -> _Read:
    """Copy all tensors to a ``cupy.cuda.Device`` now, with progress on stderr.

    They go in parts: none is ever whole in main memory.
    """
    sources = {names: _source(checkpoint, names, dtype) for names in _arrays(checkpoint, layers)}
    total = sum(part.nbytes for source in sources.values() for part in source.parts)
    with progress("to the GPU", total) as advance:

        def done(names: Names, nbytes: int) -> None:
            for name in names:
                checkpoint.forget(name)
            advance(nbytes)

        return upload(sources, device, done).__getitem__


def _source(checkpoint: Checkpoint, names: Names, dtype: str | None) -> Source:
    """Tensors as one array, which can be read in parts."""
    infos = [checkpoint.tensors[name] for name in names]
    stored = NUMPY_DTYPES[dtype or infos[0].read_dtype]
    parts = []
    for info in infos:
        row = math.prod(info.shape[1:]) * stored.itemsize
        for start, stop in ranges(info.shape[0], info.rows_at_once, max(1, PART // row)):
            read = partial(checkpoint.read_part, info.name, start, stop, dtype)
            parts.append(Part((stop - start) * row, read))
    rows = sum(info.shape[0] for info in infos)
    return Source((rows, *infos[0].shape[1:]), stored, parts)


def ranges(count: int, step: int, most: int) -> list[tuple[int, int]]:
    """Split `count` rows into ranges of at most `most`, each a multiple of `step`.

    `count` is a multiple of `step`, and a range has one step at least.
    """
    size = max(step, most // step * step)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _arrays(checkpoint: Checkpoint, layers: frozenset[int]) -> list[Names]:
    """The arrays that some layers and the rest of a model are made of, in the file's order."""
    family = checkpoint.config.model_type
    every = (names for layer in layers for names in layer_arrays(layer, family))
    together = {name: names for names in every for name in names}
    wanted = {None, *layers}
    kept = (name for name in checkpoint.tensors if _layer_of(name) in wanted)
    return list(dict.fromkeys(together.get(name, (name,)) for name in kept))


def _layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is in; None if it is outside the layers."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return None if found is None else int(found[1])
