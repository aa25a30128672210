"""Small models for fuzzing, and the arguments that they are made of, each under a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import llama_layers as ll
from tests.fuzz.api_arguments import floats, one_of, some_dtype

Arguments = dict[str, Any]
Made = tuple[Arguments, Callable[[Arguments], Any]]


def config(rng: np.random.Generator) -> ll.LlamaConfig:
    """A config of a small model."""
    kv_heads, group = (int(n) for n in rng.integers(1, 3, 2))
    layers = int(rng.integers(1, 3))
    window = None if rng.random() < 0.6 else int(rng.integers(1, 6))
    kinds = ("sliding_attention", "full_attention")
    return ll.LlamaConfig(
        vocab_size=int(rng.integers(5, 12)),
        hidden_size=int(rng.integers(2, 24)),
        intermediate_size=int(rng.integers(2, 30)),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=2 * int(rng.integers(1, 10)),
        rms_norm_eps=1e-3,
        rope_theta=100.0,
        max_position_embeddings=32,
        sliding_window=window,
        layer_types=None if window is None else [one_of(rng, kinds) for _ in range(layers)],
        attention_bias=bool(rng.random() < 0.4),
        mlp_bias=bool(rng.random() < 0.4),
    )


def layer(rng: np.random.Generator, c: ll.LlamaConfig, dtype: str) -> Arguments:
    """The arguments of a layer."""
    heads, hidden, inner = c.num_attention_heads * c.head_dim, c.hidden_size, c.intermediate_size
    rows = heads + 2 * c.num_key_value_heads * c.head_dim
    shapes = {
        "input_layernorm": (hidden,), "fused": (rows, hidden), "o_proj": (hidden, heads),
        "post_attention_layernorm": (hidden,), "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    biases = {"bias": (rows,), "o_bias": (hidden,)} if c.attention_bias else {}
    if c.mlp_bias:
        biases |= {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,)}
    arrays = {name: floats(rng, *shape, dtype=dtype) for name, shape in (shapes | biases).items()}
    heads_of = {"num_heads": c.num_attention_heads, "num_kv_heads": c.num_key_value_heads}
    return arrays | heads_of


def layer_of(a: Arguments) -> ll.LayerWeights:
    """The layer of these arguments."""
    return ll.LayerWeights(
        a["input_layernorm"],
        ll.AttentionWeights(
            ll.QKVWeights(a["fused"], a["num_heads"], a["num_kv_heads"], a.get("bias")),
            a["o_proj"],
            a.get("o_bias"),
        ),
        a["post_attention_layernorm"],
        ll.MLPWeights(
            *(a[f"{name}_proj"] for name in ("gate", "up", "down")),
            *(a.get(f"{name}_bias") for name in ("gate", "up", "down")),
        ),
    )


def model(rng: np.random.Generator) -> tuple[ll.LlamaConfig, Arguments]:
    """A config, and the arguments of a model of it."""
    c, dtype = config(rng), some_dtype(rng)
    arguments: Arguments = {
        "config": c,
        "embed_tokens": floats(rng, c.vocab_size, c.hidden_size, dtype=dtype),
        "norm": floats(rng, c.hidden_size, dtype=dtype),
        "lm_head": floats(rng, c.vocab_size, c.hidden_size, dtype=dtype),
    }
    for index in range(c.num_hidden_layers):
        parts = layer(rng, c, dtype)
        arguments |= {f"layers[{index}].{name}": value for name, value in parts.items()}
    return c, arguments


def model_of(a: Arguments, layers: int) -> ll.Llama:
    """The model of these arguments."""

    def made(index: int) -> ll.LayerWeights:
        start = f"layers[{index}]."
        return layer_of({n.removeprefix(start): v for n, v in a.items() if n.startswith(start)})

    parts = [made(index) for index in range(layers)]
    weights = ll.LlamaWeights(a["embed_tokens"], parts, a["norm"], a["lm_head"])
    return ll.Llama(a["config"], weights)


def mask(rng: np.random.Generator, batch: int, queries: int, keys: int) -> Arguments:
    """Of a Mask, or "mask" alone."""
    kind = one_of(rng, ("none", "rows", "rows of each", "slots", "slots"))
    if kind == "none":
        return {"mask": None}
    if kind == "slots":
        dtype = one_of(rng, ("i4", "i8", "i8", "u2"))
        window = None if rng.random() < 0.5 else one_of(rng, (1, 3, 2**40, 10**30, np.int8(5)))
        keep = None if rng.random() < 0.6 else rng.random((batch, keys)) < 0.7
        first = max(0, keys - queries)
        return {
            "queries": np.arange(first, first + queries).astype(dtype),
            "keys": np.arange(keys).astype(dtype),
            "window": window,
            "keep": keep,
        }
    shape = (queries, keys) if kind == "rows" else (batch, queries, keys)
    return {"mask": rng.random(shape) < 0.6}


def mask_of(a: Arguments) -> Any:
    """The mask of these arguments."""
    return a["mask"] if "mask" in a else ll.Mask(a["queries"], a["keys"], a["window"], a["keep"])
