"""From an opened checkpoint to the weights of a model, each read when it is first used."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.placement import cupy_device, is_cupy, placement
from llama_layers.checkpoint.casting import cast, checked_dtype
from llama_layers.checkpoint.opened import Checkpoint
from llama_layers.checkpoint.opening import open_checkpoint
from llama_layers.checkpoint.uploading import uploaded
from llama_layers.errors import CheckpointError
from llama_layers.layers.weights import Names
from llama_layers.model.llama import Llama
from llama_layers.model.weight_checks import unfusible
from llama_layers.model.weights import LlamaWeights, layer_arrays


def load(
    path: str | os.PathLike[str],
    /,
    *,
    backend: Literal["numpy", "cupy"] | ModuleType = "numpy",
    dtype: Any = None,
    device: Any = None,
    layers: Iterable[int] | None = None,
) -> Llama:
    """Load a model.

    Everything is checked at once, from the headers; a weight is read when it is first used, and
    then kept. On NumPy, weights that the file holds as they are needed stay views of the file. On
    CuPy, all are copied to the GPU at once, in parts, so that main memory holds few of them.

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

    Returns
    -------
    Llama
        The model.

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
    place = placement(backend, device)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    chosen = _chosen(layers, config.num_hidden_layers)
    if name is None:
        dtypes = {key: info.read_dtype for key, info in checkpoint.tensors.items()}
        if difference := unfusible(dtypes, chosen):
            raise CheckpointError(f"{checkpoint.path}: {difference}: pass a dtype to load them in")
    read = _reading(checkpoint, name, place)
    if is_cupy(backend):
        arrays = uploaded(checkpoint, _arrays(checkpoint, chosen), name, cupy_device(device))
        read = arrays.__getitem__
    weights = LlamaWeights.from_named(_Tensors(checkpoint, chosen, read), config)
    return Llama(config, weights, checkpoint.open_tokenizer, checkpoint.generation_config)


# A function that gives some tensors of a checkpoint as one array.
_Read = Callable[[Names], Any]


def _reading(
    checkpoint: Checkpoint, dtype: str | None, place: Callable[[NDArray[Any]], Any]
) -> _Read:
    """Read tensors whole, and then place them where they belong."""

    def read(names: Names) -> Any:
        stored = {checkpoint.tensors[name].read_dtype for name in names}
        if len(names) > 1 and (dtype is None or stored == {dtype}):
            return place(checkpoint.read_rows(names))
        parts = [cast(name, checkpoint.read(name), dtype) for name in names]
        return place(parts[0] if len(parts) == 1 else np.concatenate(parts))

    return read


class _Tensors(Mapping[str, Any]):
    """The tensors of a checkpoint as arrays, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, layers: frozenset[int], read: _Read) -> None:
        self._checkpoint, self._layers, self._read = checkpoint, layers, read

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.tensors

    def __getitem__(self, name: str) -> Any:
        return self.rows((name,))

    def rows(self, names: Names) -> Any:
        """Tensors as one array; a CheckpointError if their layer was not asked for."""
        layer = re.match(r"model\.layers\.(\d+)\.", names[0])
        if layer and int(layer[1]) not in self._layers:
            raise CheckpointError(
                f"layer {layer[1]}: not loaded; load(..., layers=...) asked for "
                f"{', '.join(map(str, sorted(self._layers))) or 'none'}"
            )
        return self._read(names)


def _chosen(layers: Iterable[int] | None, count: int) -> frozenset[int]:
    if layers is None:
        return frozenset(range(count))
    chosen = set()
    for layer in layers:  # which may be billions: stop at the first that is out of range
        if not 0 <= operator.index(layer) < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer}")
        chosen.add(operator.index(layer))
    return frozenset(chosen)


def _arrays(checkpoint: Checkpoint, layers: frozenset[int]) -> list[Names]:
    """The arrays that a model is made of, in the order of the checkpoint's tensors."""
    left_out = set(range(checkpoint.config.num_hidden_layers)) - layers
    prefixes = tuple(f"model.layers.{layer}." for layer in left_out)
    fused = {name: names for layer in layers for names in layer_arrays(layer) for name in names}
    kept = (name for name in checkpoint.tensors if not name.startswith(prefixes))
    return list(dict.fromkeys(fused.get(name, (name,)) for name in kept))
