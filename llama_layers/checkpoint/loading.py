"""From an opened checkpoint to the weights of a model, each read when it is first used."""

from __future__ import annotations

import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.placement import cupy_device, is_cupy, placement
from llama_layers.checkpoint.casting import cast, checked_dtype
from llama_layers.checkpoint.names import qkv_names
from llama_layers.checkpoint.opened import Checkpoint
from llama_layers.checkpoint.opening import open_checkpoint
from llama_layers.checkpoint.uploading import Names, uploaded
from llama_layers.errors import CheckpointError
from llama_layers.llama import Llama
from llama_layers.weights import (
    AttentionWeights,
    LayerWeights,
    LlamaWeights,
    MLPWeights,
    QKVWeights,
)


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
        file with config.json beside it, a .gguf file, or the name of a known model.
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
        If there is nothing there, it is malformed, its tensors are not those of its config, or a
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
        _check_fusible(checkpoint, chosen)
    reader: _Reader = _Placing(checkpoint, name, place)
    if is_cupy(backend):
        arrays = uploaded(checkpoint, _arrays(checkpoint, chosen), name, cupy_device(device))
        reader = _Uploaded(checkpoint, arrays)
    weights = _StoredWeights.of(reader, chosen)
    return Llama(config, weights, checkpoint.open_tokenizer, checkpoint.generation_config)


class _Reader(ABC):
    """Tensors of a checkpoint as arrays of one backend and dtype."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @abstractmethod
    def tensor(self, name: str) -> Any: ...

    @abstractmethod
    def fused(self, names: Sequence[str]) -> Any:
        """Some tensors as one array, their rows below each other; None if there are none."""

    def optional(self, name: str) -> Any:
        return self.tensor(name) if name in self.checkpoint.tensors else None

    def layer(self, layer: int) -> LayerWeights:
        config = self.checkpoint.config
        prefix = f"model.layers.{layer}."
        mlp = prefix + "mlp."
        return LayerWeights(
            input_layernorm=self.tensor(prefix + "input_layernorm.weight"),
            self_attn=AttentionWeights(
                qkv=QKVWeights(
                    self.fused(qkv_names(layer)),
                    num_heads=config.num_attention_heads,
                    num_kv_heads=config.num_key_value_heads,
                    bias=self.fused(qkv_names(layer, "bias")),
                ),
                o_proj=self.tensor(prefix + "self_attn.o_proj.weight"),
                o_bias=self.optional(prefix + "self_attn.o_proj.bias"),
            ),
            post_attention_layernorm=self.tensor(prefix + "post_attention_layernorm.weight"),
            mlp=MLPWeights(
                gate_proj=self.tensor(mlp + "gate_proj.weight"),
                up_proj=self.tensor(mlp + "up_proj.weight"),
                down_proj=self.tensor(mlp + "down_proj.weight"),
                gate_bias=self.optional(mlp + "gate_proj.bias"),
                up_bias=self.optional(mlp + "up_proj.bias"),
                down_bias=self.optional(mlp + "down_proj.bias"),
            ),
        )


class _Placing(_Reader):
    """Reads a tensor whole, and then places it where it belongs."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: str | None, place: Callable[[NDArray[Any]], Any]
    ) -> None:
        super().__init__(checkpoint)
        self._dtype = dtype
        self._place = place

    def tensor(self, name: str) -> Any:
        return self._place(cast(name, self.checkpoint.read(name), self._dtype))

    def fused(self, names: Sequence[str]) -> Any:
        tensors = self.checkpoint.tensors
        if names[0] not in tensors:
            return None
        stored = {tensors[name].read_dtype for name in names}
        if self._dtype is None or stored == {self._dtype}:
            return self._place(self.checkpoint.read_rows(names))
        parts = [cast(name, self.checkpoint.read(name), self._dtype) for name in names]
        return self._place(np.concatenate(parts))


class _Uploaded(_Reader):
    """Arrays that are where they belong already."""

    def __init__(self, checkpoint: Checkpoint, arrays: Mapping[Names, Any]) -> None:
        super().__init__(checkpoint)
        self._arrays = arrays

    def tensor(self, name: str) -> Any:
        return self._arrays[(name,)]

    def fused(self, names: Sequence[str]) -> Any:
        return self._arrays.get(tuple(names))


class _StoredWeights(LlamaWeights):
    """Weights of a checkpoint: what the fields of `LlamaWeights` hold is read when first used."""

    _reader: _Reader

    @classmethod
    def of(cls, reader: _Reader, layers: frozenset[int]) -> _StoredWeights:
        # Not through __init__, which takes the fields themselves: dataclasses.replace calls it.
        weights = object.__new__(cls)
        object.__setattr__(weights, "_reader", reader)
        object.__setattr__(weights, "layers", _StoredLayers(reader, layers))
        return weights

    @cached_property
    def embed_tokens(self) -> Any:
        return self._reader.tensor("model.embed_tokens.weight")

    @cached_property
    def norm(self) -> Any:
        return self._reader.tensor("model.norm.weight")

    @cached_property
    def lm_head(self) -> Any:
        if self._reader.checkpoint.config.tie_word_embeddings:
            return self.embed_tokens
        return self._reader.tensor("lm_head.weight")


class _StoredLayers(Sequence[LayerWeights]):
    """Layers of a checkpoint, each read when first used and then kept."""

    def __init__(self, reader: _Reader, loaded: frozenset[int]) -> None:
        self._reader = reader
        self._loaded = loaded
        self._kept: dict[int, LayerWeights] = {}

    def __len__(self) -> int:
        return self._reader.checkpoint.config.num_hidden_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | list[LayerWeights]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        layer = range(len(self))[index]
        if layer not in self._loaded:
            raise CheckpointError(
                f"layer {layer}: not loaded; load(..., layers=...) asked for "
                f"{', '.join(map(str, sorted(self._loaded))) or 'none'}"
            )
        if layer not in self._kept:
            self._kept[layer] = self._reader.layer(layer)
        return self._kept[layer]


def _chosen(layers: Iterable[int] | None, count: int) -> frozenset[int]:
    if layers is None:
        return frozenset(range(count))
    chosen = frozenset(operator.index(layer) for layer in layers)
    for layer in sorted(chosen):
        if not 0 <= layer < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer}")
    return chosen


def _arrays(checkpoint: Checkpoint, layers: frozenset[int]) -> list[Names]:
    """The arrays that a model is made of, in the order of the checkpoint's tensors."""
    left_out = set(range(checkpoint.config.num_hidden_layers)) - layers
    prefixes = tuple(f"model.layers.{layer}." for layer in left_out)
    fused = {
        name: tuple(names)
        for layer in layers
        for names in (qkv_names(layer), qkv_names(layer, "bias"))
        for name in names
    }
    kept = (name for name in checkpoint.tensors if not name.startswith(prefixes))
    return list(dict.fromkeys(fused.get(name, (name,)) for name in kept))


def _check_fusible(checkpoint: Checkpoint, layers: frozenset[int]) -> None:
    """Queries, keys and values become one array, so they need one dtype."""
    for layer in layers:
        for kind in ("weight", "bias"):
            names = [name for name in qkv_names(layer, kind) if name in checkpoint.tensors]
            dtypes = [checkpoint.tensors[name].read_dtype for name in names]
            if len(set(dtypes)) > 1:
                raise CheckpointError(
                    f"{checkpoint.path}: {', '.join(names)} are of different dtypes, "
                    f"{', '.join(dtypes)}: pass a dtype to load them in"
                )
