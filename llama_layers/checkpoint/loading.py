"""From an opened checkpoint to the weights of a model, each read when it is first used."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from llama_layers.backends.dtypes import FLOATS, dtype_name
from llama_layers.backends.placement import placement
from llama_layers.checkpoint.names import qkv_names
from llama_layers.checkpoint.opened import NUMPY_DTYPES, Checkpoint
from llama_layers.checkpoint.opening import open_checkpoint
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
    then kept. On NumPy, weights that the file holds as they are needed stay views of the file.

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
        number is too large for `dtype` (the last when the weight is first used).
    ConfigError
        If the config is incomplete or asks for what is not implemented.
    RuntimeError
        If CuPy is asked for and cannot compute here; it says what is missing.
    ImportError
        If the file is GGUF and the package ``gguf`` is not installed.
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
    weights = _StoredWeights.of(_Reader(checkpoint, name, place), chosen)
    return Llama(config, weights, checkpoint.open_tokenizer)


class _Reader:
    """Tensors of a checkpoint as arrays of one backend and dtype."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: str | None, place: Callable[[NDArray[Any]], Any]
    ) -> None:
        self.checkpoint = checkpoint
        self._dtype = dtype
        self._place = place

    def tensor(self, name: str) -> Any:
        return self._place(cast(name, self.checkpoint.read(name), self._dtype))

    def optional(self, name: str) -> Any:
        return self.tensor(name) if name in self.checkpoint.tensors else None

    def fused(self, names: Sequence[str]) -> Any:
        tensors = self.checkpoint.tensors
        if names[0] not in tensors:
            return None
        stored = {tensors[name].read_dtype for name in names}
        if self._dtype is None or stored == {self._dtype}:
            return self._place(self.checkpoint.read_rows(names))
        parts = [cast(name, self.checkpoint.read(name), self._dtype) for name in names]
        return self._place(np.concatenate(parts))

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


def cast(name: str, array: NDArray[Any], dtype: str | None) -> NDArray[Any]:
    """Round or widen a tensor to a dtype; a CheckpointError if a finite number would overflow."""
    if dtype is None or array.dtype == NUMPY_DTYPES[dtype]:
        return array
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result = array.astype(NUMPY_DTYPES[dtype])
    if FLOATS[dtype].max < FLOATS[dtype_name(array.dtype)].max:
        overflowed = np.isinf(result) & ~np.isinf(array)
        if overflowed.any():
            raise CheckpointError(
                f"{name}: {float(array[overflowed][0]):g} is too large for {dtype}; "
                f"bfloat16 has the range of float32"
            )
    return result


def checked_dtype(dtype: Any) -> str:
    """The name of a dtype to load weights in; a ValueError if it is none."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", dtype_name(dtype))
    if name not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(FLOATS)}, got {name!r}")
    return name


def _chosen(layers: Iterable[int] | None, count: int) -> frozenset[int]:
    if layers is None:
        return frozenset(range(count))
    chosen = frozenset(operator.index(layer) for layer in layers)
    for layer in sorted(chosen):
        if not 0 <= layer < count:
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer}")
    return chosen


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
