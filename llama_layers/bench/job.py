"""The computation that is timed: the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from array_api_compat import device, is_cupy_array
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS, dtype_name
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import from_numpy
from llama_layers.arrays.types import Array
from llama_layers.bench.cost import Cost, decode_cost, layers_cost, linear_cost, model_cost
from llama_layers.bench.models import Backend
from llama_layers.config.llama_config import LlamaConfig, with_layers
from llama_layers.layers.cache import KVCache
from llama_layers.layers.weights import QKVWeights
from llama_layers.model.llama import Llama

Kind = Literal["qkv", "layer", "decode", "prefill"]
# Bytes of all copies of the weights, which take turns so that none stays in the cache. A GPU has
# more of them, so that reading takes long enough to be timed.
UNCACHED = {"numpy": 256 << 20, "cupy": 1 << 30}
MOST_COPIES = 64


def copies(nbytes: int, backend: Backend = "numpy") -> int:
    """Return how many copies of some bytes are enough to be read from memory each time."""
    return min(MOST_COPIES, math.ceil(UNCACHED[backend] / nbytes))


def placed(array: np.ndarray, like: Array) -> Array:
    """Move a NumPy array to where another array is."""
    return (
        array
        if isinstance(like, np.ndarray)
        else from_numpy(array, namespace(like=like), device(like))
    )


@dataclass(frozen=True, eq=False)
class QKVJob:
    """Hidden states times the fused query, key and value matrix."""

    weights: Sequence[QKVWeights]
    """Copies of one size, each used once in a timed call."""
    sizes: Sequence[int]
    """Tokens of the cases."""
    kind: Kind = "qkv"

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return dtype_name(self.weights[0].fused.dtype)

    @property
    def units(self) -> int:
        """The number of products in a timed call."""
        return len(self.weights)

    def x(self, size: int) -> Array:
        """Draw hidden states [1, S, hidden_size]: float32 in NumPy, else in the weights' dtype."""
        rng = np.random.default_rng(size)
        x = rng.standard_normal((1, size, self.weights[0].hidden_size), np.float32)
        fused = self.weights[0].fused
        return placed(x if isinstance(fused, np.ndarray) else x.astype(fused.dtype), fused)

    def cost(self, size: int) -> Cost:
        """The cost of one product."""
        outputs, inputs = self.weights[0].fused.shape
        return linear_cost(outputs, inputs, size, FLOATS[self.dtype].itemsize)

    def case(self, size: int) -> str:
        """The name of a case."""
        return f"S = {size}"

    def tokens(self, size: int) -> int | None:
        """The tokens of one unit, where a rate of them means something."""
        return None

    def title(self) -> str:
        """Say what is measured."""
        outputs, inputs = self.weights[0].fused.shape
        return f"Q, K and V: {inputs} to {outputs}, {self.dtype} weights, {_times(self.units)}"


@dataclass(frozen=True, eq=False)
class ModelJob:
    """Tokens through a model, in one pass or one by one, after others that its cache holds."""

    model: Llama
    """The model; for "layer", copies of one layer and a small vocabulary."""
    kind: Kind
    """The kind of a unit: a layer, a token, or a prompt."""
    sizes: Sequence[int]
    """Tokens of the cases; for "decode" the tokens in the cache before."""
    context: int = 0
    """For "layer": tokens in the cache before."""
    steps: int = 1
    """For "decode": tokens of each sequence in a timed call."""
    batch: int = 1
    """For "decode": sequences."""

    @property
    def config(self) -> LlamaConfig:
        """The config of the model."""
        return self.model.config

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return dtype_name(self.model.weights.embed_tokens.dtype)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn and fed back on the device instead of given."""
        return self.kind == "decode" and is_cupy_array(self.model.weights.embed_tokens)

    @property
    def units(self) -> int:
        """The number of units in a timed call."""
        return {"layer": self.config.num_hidden_layers, "decode": self.steps, "prefill": 1}[
            self.kind
        ]

    def passes(self, size: int) -> tuple[int, list[int]]:
        """Return how many tokens the cache holds before, and those of each timed pass."""
        if self.kind == "decode":
            return size, [1] * self.steps
        return (self.context if self.kind == "layer" else 0), [size]

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        """Token ids [B, T], of which every case takes the first ones."""
        longest = max(before + sum(parts) for before, parts in map(self.passes, self.sizes))
        return np.random.default_rng(0).integers(0, self.config.vocab_size, (self.batch, longest))

    def cost(self, size: int) -> Cost:
        """The cost of one unit."""
        stored = FLOATS[self.dtype].itemsize
        cached = KVCache.create(self.model, 1, 1).keys[0].dtype.itemsize
        if self.kind == "layer":
            return layers_cost(with_layers(self.config, 1), size, self.context, stored, cached)
        if self.kind == "decode":
            return decode_cost(self.config, self.steps, size, stored, cached, self.batch)
        return model_cost(self.config, size, 0, stored, cached)

    def case(self, size: int) -> str:
        """The name of a case."""
        if self.kind == "layer":
            return f"S = {size}"
        return f"after {size} tokens" if self.kind == "decode" else f"{size} tokens"

    def tokens(self, size: int) -> int | None:
        """The tokens of one unit, where a rate of them means something."""
        return {"layer": None, "decode": self.batch, "prefill": size}[self.kind]

    def title(self) -> str:
        """Say what is measured."""
        c = self.config
        heads = f"{c.num_attention_heads} query and {c.num_key_value_heads} key/value heads"
        sizes = f"hidden size {c.hidden_size}, MLP {c.intermediate_size}, {heads}"
        end = f"{sizes}, {self.dtype} weights"
        if self.kind == "layer":
            return (
                f"One layer after {self.context} tokens: {end}, "
                f"{_times(c.num_hidden_layers)}; one sequence"
            )
        what = "Prefill" if self.kind == "prefill" else f"Decode, {self.steps} tokens a round"
        sequences = "one sequence" if self.batch == 1 else f"{self.batch} sequences"
        layers = "1 layer" if c.num_hidden_layers == 1 else f"{c.num_hidden_layers} layers"
        return f"{what}: {layers} of {end}; {sequences}"


Job = QKVJob | ModelJob


def _times(count: int) -> str:
    return "one copy" if count == 1 else f"{count} copies in turn"
