"""The models that are measured: checkpoints, and published sizes with random weights."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, dtype_of
from llama_layers.arrays.types import Array, Namespace
from llama_layers.checkpoint import load, open_checkpoint
from llama_layers.checkpoint.hub import hub_name
from llama_layers.checkpoint.known_models import KNOWN_MODELS, cached_path
from llama_layers.config.llama_config import LlamaConfig, with_layers
from llama_layers.config.presets import Preset, PublishedSizes
from llama_layers.layers.group import Group
from llama_layers.layers.weights import QKVWeights
from llama_layers.model.llama import Llama
from llama_layers.model.tensor_names import expected_tensors
from llama_layers.model.weights import LlamaWeights
from llama_layers.parallel.mpi import MPIGroup
from llama_layers.parallel.plan import Shard

PRESETS = {k.replace("_", "-"): k for k, v in vars(PublishedSizes).items() if isinstance(v, Preset)}
# The share of the memory that weights may take.
SHARE = 0.7

Backend = Literal["numpy", "cupy"]


def is_checkpoint(name: str) -> bool:
    """Whether `load` takes a name, which may else be that of a published size only."""
    return Path(name).exists() or name in KNOWN_MODELS or hub_name(name) is not None


def config_of(name: str) -> LlamaConfig:
    """Return the config of a checkpoint or of a published size."""
    pulled = name in KNOWN_MODELS and cached_path(name).exists()
    if Path(name).exists() or pulled or hub_name(name) is not None:
        return open_checkpoint(name).config
    if name not in PRESETS:
        raise ValueError(
            f"--model: {name}: expected a directory, a file, org/name on the Hugging Face Hub, "
            f"or one of {', '.join(sorted({*PRESETS, *KNOWN_MODELS}))}"
        )
    return getattr(LlamaConfig, PRESETS[name])()


def opened_model(
    name: str,
    dtype: str,
    layers: int | None,
    backend: Backend = "numpy",
    group: Group | None = None,
) -> Llama:
    """Load a checkpoint, or its first layers only; with a group this rank's part."""
    model = load(name, dtype=dtype, backend=backend, parallel=group)
    count = model.config.num_hidden_layers
    if layers is None or layers == count:
        return model
    if layers > count:
        raise ValueError(f"--layers: expected at most {count}, those of the model, got {layers}")
    weights = model.weights
    first = LlamaWeights(
        weights.embed_tokens, weights.layers[:layers], weights.norm, weights.lm_head, group=group
    )
    return Llama(with_layers(model.config, layers), first, model.open_tokenizer)


class RandomWeights:
    """Random weights of a dtype: normal numbers from a block that is used again and again.

    Drawing each of billions would take minutes, and no speed depends on it. Each matrix begins
    elsewhere in the block: an engine that finds two equal ones might keep only one. Numbers are
    copied as integers, since a GPU's library might have to compile a kernel for other types.
    """

    def __init__(self, dtype: str, backend: Backend = "numpy") -> None:
        self._xp: Namespace = importlib.import_module(backend)
        self._dtype: np.dtype = np.dtype(dtype_of(np, dtype))
        self._block = np.random.default_rng(0).standard_normal((1 << 20) + 7, np.float32)
        self._made = 0

    def matrix(self, outputs: int, inputs: int) -> Array:
        """Make a matrix [out, in] that keeps the size of a row."""
        self._made += 1
        scaled = (self._block / np.float32(math.sqrt(inputs))).astype(self._dtype)
        integers = np.dtype(f"u{self._dtype.itemsize}")
        block = self._xp.asarray(np.roll(scaled, self._made).view(integers))
        flat = self._xp.empty(outputs * inputs, integers)
        for start in range(0, flat.size, block.size):
            part = flat[start : start + block.size]
            part[:] = block[: part.size]
        return flat.view(self._dtype).reshape(outputs, inputs)

    def ones(self, count: int) -> Array:
        """Make the weight of a norm."""
        return self._xp.asarray(np.ones(count, self._dtype))

    def qkv(self, config: LlamaConfig) -> QKVWeights:
        """Make fused projections without biases."""
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        return QKVWeights(
            self.matrix(heads * config.head_dim, config.hidden_size),
            config.num_attention_heads,
            config.num_key_value_heads,
        )

    def model(self, config: LlamaConfig, group: Group | None = None) -> Llama:
        """Make a model without biases."""
        weights = LlamaWeights.from_named(_Tensors(self, config), config, group=group)
        list(weights.layers)  # made now, and not when they are first used
        return Llama(config, weights)


class _Tensors(Mapping[str, Array]):
    """Random tensors of a model by name; Q, K and V in one piece."""

    def __init__(self, weights: RandomWeights, config: LlamaConfig) -> None:
        self._weights, self._shapes = weights, expected_tensors(config)

    def rows(self, names: tuple[str, ...]) -> Array:
        """Make one array for all of these names, their rows below each other."""
        outputs = sum(self._shapes[name][0] for name in names)
        inputs = self._shapes[names[0]][1:]
        return self._weights.matrix(outputs, *inputs) if inputs else self._weights.ones(outputs)

    def __getitem__(self, name: str) -> Array:
        return self.rows((name,))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def without_biases(config: LlamaConfig) -> LlamaConfig:
    """Drop the biases from a config: adding them takes no time worth measuring."""
    kind = "llama" if config.model_type == "qwen2" else config.model_type
    return replace(config, model_type=kind, attention_bias=False, mlp_bias=False)


def random_model(
    config: LlamaConfig,
    dtype: str,
    layers: int | None,
    engines: int,
    backend: Backend = "numpy",
    group: MPIGroup | None = None,
) -> Llama:
    """Make a model of some size with random weights; with a group this rank's part.

    Without a number of layers it has all of the config's that fit into memory: on a CPU each
    engine holds the weights, on a GPU they share them. Raises MemoryError if not even one fits.
    """
    config = without_biases(config)
    if group is not None:
        config = Shard(config, group.rank, group.size).config
    if layers is None:
        held = engines if group is None else group.here()[1]
        memory = available_memory() / held if backend == "numpy" else available_on_gpu()
        layers = layers_that_fit(config, dtype, int(memory * SHARE))
        if group is not None:
            layers = min(group.gather(layers))
    return RandomWeights(dtype, backend).model(with_layers(config, layers), group)


def layers_that_fit(config: LlamaConfig, dtype: str, nbytes: int) -> int:
    """Return how many layers of a model fit into some bytes, up to those of the config."""
    itemsize = FLOATS[dtype].itemsize
    sizes = [
        itemsize * sum(map(math.prod, expected_tensors(with_layers(config, count)).values()))
        for count in (1, 2)
    ]
    each = sizes[1] - sizes[0]
    count = 1 + (nbytes - sizes[0]) // each
    if count < 1:
        raise MemoryError(
            f"one layer in {dtype} and the vocabulary take {sizes[0] / 1e9:.1f} GB in each "
            f"engine, of which {nbytes / 1e9:.1f} GB may be taken"
        )
    return min(count, config.num_hidden_layers)


def available_memory() -> int:
    """Return the free bytes of memory; half of all where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def available_on_gpu() -> int:
    """Return the free bytes of the current device."""
    free, _ = importlib.import_module("cupy").cuda.runtime.memGetInfo()
    return int(free)
