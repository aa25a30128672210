"""The least cost of a computation: bytes read from memory, and operations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.model.tensor_names import expected_tensors


@dataclass(frozen=True)
class Cost:
    """Bytes and operations."""

    nbytes: int
    """Weights, each once, and cached keys and values. Activations are not counted: they can stay
    in the processor's cache."""
    flops: int
    """Additions and multiplications of the products with matrices and of attention; the rest of
    a layer is a few for each number, and not counted."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nbytes + other.nbytes, self.flops + other.flops)


def linear_cost(outputs: int, inputs: int, rows: int, itemsize: int) -> Cost:
    """Count rows times a matrix [outputs, inputs]."""
    return Cost(outputs * inputs * itemsize, 2 * rows * outputs * inputs)


def attention_cost(
    config: LlamaConfig, window: int | None, rows: int, past: int, itemsize: int
) -> Cost:
    """Count attention of some tokens of one sequence to themselves and to `past` cached ones.

    Each query meets each key that it sees in a dot product, and weighs its value: 4 operations for
    each number of a query head. Only the keys and values of earlier tokens are read.
    """
    seen = sum(min(past + row + 1, window or math.inf) for row in range(rows))
    read = min(past, (window or math.inf) - 1)
    numbers = 2 * config.num_key_value_heads * config.head_dim
    return Cost(
        int(read) * numbers * itemsize,
        4 * config.num_attention_heads * config.head_dim * int(seen),
    )


def layers_cost(
    config: LlamaConfig, rows: int, past: int, itemsize: int, cache_itemsize: int, batch: int = 1
) -> Cost:
    """Count some tokens of each sequence through all layers, after `past` cached ones."""
    shapes = [s for name, s in expected_tensors(config).items() if name.startswith("model.layers.")]
    cost = Cost(
        sum(map(math.prod, shapes)) * itemsize,
        2 * batch * rows * sum(math.prod(shape) for shape in shapes if len(shape) == 2),
    )
    for layer in range(config.num_hidden_layers):
        one = attention_cost(config, config.window_of(layer), rows, past, cache_itemsize)
        cost += Cost(batch * one.nbytes, batch * one.flops)
    return cost


def model_cost(
    config: LlamaConfig, rows: int, past: int, itemsize: int, cache_itemsize: int, batch: int = 1
) -> Cost:
    """Count a forward pass of some tokens of each sequence, to the logits of the last ones."""
    embedding_rows_and_norm = (batch * rows + 1) * config.hidden_size * itemsize
    return (
        layers_cost(config, rows, past, itemsize, cache_itemsize, batch)
        + linear_cost(config.vocab_size, config.hidden_size, batch, itemsize)
        + Cost(embedding_rows_and_norm, 0)
    )


def decode_cost(
    config: LlamaConfig, tokens: int, past: int, itemsize: int, cache_itemsize: int, batch: int = 1
) -> Cost:
    """Count forward passes of one token each, after `past` others; return the mean of a pass."""
    total = Cost(0, 0)
    for token in range(tokens):
        total += model_cost(config, 1, past + token, itemsize, cache_itemsize, batch)
    return Cost(total.nbytes // tokens, total.flops // tokens)
