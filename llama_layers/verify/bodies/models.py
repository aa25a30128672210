"""Tiny random models to try bodies on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.config import LlamaConfig
from llama_layers.llama import Llama
from llama_layers.verify.bodies.operations import DTYPES
from llama_layers.verify.bodies.place import Place
from llama_layers.weights import (
    AttentionWeights,
    LayerWeights,
    LlamaWeights,
    MLPWeights,
    QKVWeights,
)

Move = Callable[[NDArray[Any]], Any]

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
        numbers = _numbers(config, DTYPES[name])
        for layer in numbers.layers:
            layer.self_attn.qkv.fused[...] *= np.float32(scale)
        # NumPy computes in float32 whatever the layers are stored in, and CuPy in one format.
        if place.xp is np:
            table = numbers.embed_tokens.astype(np.float32)
            numbers = replace(numbers, embed_tokens=table)
        self.plain = Llama(config, numbers)
        self.there = Llama(config, _mapped(numbers, place.array))
        self.exact = Llama(config, _mapped(numbers, lambda array: array.astype(np.float64)))


def _numbers(config: LlamaConfig, dtype: np.dtype[Any]) -> LlamaWeights:
    """Matrices that keep a row's size, and norms and biases that make a difference."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        return (rng.standard_normal((rows, columns)) / math.sqrt(columns)).astype(dtype)

    def norm() -> NDArray[Any]:
        return (1 + rng.standard_normal(hidden) / 4).astype(dtype)

    def bias(there: bool, rows: int) -> NDArray[Any] | None:
        return rng.standard_normal(rows).astype(dtype) if there else None

    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = (heads + 2 * kv_heads) * width

    def layer() -> LayerWeights:
        attention, mlp = config.attention_bias, config.mlp_bias
        return LayerWeights(
            norm(),
            AttentionWeights(
                QKVWeights(matrix(rows, hidden), heads, kv_heads, bias(attention, rows)),
                matrix(hidden, heads * width),
                bias(attention, hidden),
            ),
            norm(),
            MLPWeights(
                matrix(inner, hidden), matrix(inner, hidden), matrix(hidden, inner),
                bias(mlp, inner), bias(mlp, inner), bias(mlp, hidden),
            ),
        )  # fmt: skip

    table = rng.standard_normal((config.vocab_size, hidden)).astype(dtype)
    layers = [layer() for _ in range(config.num_hidden_layers)]
    return LlamaWeights(table, layers, norm(), matrix(config.vocab_size, hidden))


def _mapped(weights: LlamaWeights, move: Move) -> LlamaWeights:
    """The same numbers elsewhere, or in another format."""

    def moved(array: Any | None) -> Any | None:
        return None if array is None else move(array)

    def layer(w: LayerWeights) -> LayerWeights:
        attention, mlp = w.self_attn, w.mlp
        qkv = attention.qkv
        return LayerWeights(
            move(w.input_layernorm),
            AttentionWeights(
                QKVWeights(move(qkv.fused), qkv.num_heads, qkv.num_kv_heads, moved(qkv.bias)),
                move(attention.o_proj),
                moved(attention.o_bias),
            ),
            move(w.post_attention_layernorm),
            MLPWeights(
                move(mlp.gate_proj), move(mlp.up_proj), move(mlp.down_proj),
                moved(mlp.gate_bias), moved(mlp.up_bias), moved(mlp.down_bias),
            ),
        )  # fmt: skip

    return LlamaWeights(
        move(weights.embed_tokens), [layer(w) for w in weights.layers], move(weights.norm),
        move(weights.lm_head),
    )  # fmt: skip
