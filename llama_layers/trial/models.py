"""Tiny random models to try bodies on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.model.llama import Llama
from llama_layers.model.tensor_names import EMBEDDING, expected_tensors
from llama_layers.model.weights import LlamaWeights
from llama_layers.trial.operations import DTYPES
from llama_layers.trial.place import Place

Move = Callable[[np.ndarray], Array]

# Biases, groups of three heads, a window on one layer; sizes that fill vectors of 8.
EVEN = LlamaConfig(
    vocab_size=19,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-4,
    rope_theta=100.0,
    max_position_embeddings=512,
    attention_bias=True,
    mlp_bias=True,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention"),
)
# Sizes that fill nothing.
ODD = replace(
    EVEN,
    hidden_size=22,
    intermediate_size=27,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=6,
    attention_bias=False,
    mlp_bias=False,
    sliding_window=None,
    layer_types=None,
)


class TinyModel:
    """A random model in its formats, where a body is tried and in main memory, and in float64."""

    def __init__(self, config: LlamaConfig, name: str, place: Place, scale: float = 1.0) -> None:
        self.place = place
        numbers = _numbers(config, DTYPES[name], scale)
        # NumPy computes in float32 whatever the layers are stored in, and CuPy in one format.
        if place.xp is np:
            numbers[EMBEDDING] = numbers[EMBEDDING].astype(np.float32)
        self.plain = _model(config, numbers, lambda array: array)
        self.there = _model(config, numbers, place.array)
        self.exact = _model(config, numbers, lambda array: array.astype(np.float64))


def _numbers(config: LlamaConfig, dtype: np.dtype, scale: float) -> dict[str, np.ndarray]:
    """Tensors by name: matrices that keep a row's size, norms and biases that make a difference.

    The matrices of queries, keys and values are larger by the scale.
    """
    rng = np.random.default_rng(0)
    numbers = {}
    for name, shape in expected_tensors(config).items():
        drawn = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            drawn = 1 + drawn / 4
        elif len(shape) == 2 and name != EMBEDDING:
            drawn /= math.sqrt(shape[1])
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            drawn *= scale
        numbers[name] = drawn.astype(dtype)
    return numbers


def _model(config: LlamaConfig, numbers: dict[str, np.ndarray], move: Move) -> Llama:
    """A model of these numbers elsewhere, or in another format."""
    arrays = {name: move(array) for name, array in numbers.items()}
    return Llama(config, LlamaWeights.from_named(arrays, config))
