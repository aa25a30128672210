"""A model's arrays by the names that Hugging Face gives them, for engines that take them so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_layers.layers.weights import LayerWeights
from llama_layers.model.llama import Llama


def named_arrays(model: Llama) -> Iterator[tuple[str, Any]]:
    """Each array of a model once, without those that it has not; a tied head is left out."""
    weights = model.weights
    yield "model.embed_tokens.weight", weights.embed_tokens
    for index, layer in enumerate(weights.layers):
        for name, array in _layer(layer):
            if array is not None:
                yield f"model.layers.{index}.{name}", array
    yield "model.norm.weight", weights.norm
    if not model.config.tie_word_embeddings:
        yield "lm_head.weight", weights.lm_head


def _layer(w: LayerWeights) -> Iterator[tuple[str, Any]]:
    qkv = w.self_attn.qkv
    yield "input_layernorm.weight", w.input_layernorm
    start = 0
    for name, rows in (("q", qkv.q), ("k", qkv.k), ("v", qkv.v)):
        stop = start + rows.shape[0]
        yield f"self_attn.{name}_proj.weight", rows
        yield f"self_attn.{name}_proj.bias", None if qkv.bias is None else qkv.bias[start:stop]
        start = stop
    yield "self_attn.o_proj.weight", w.self_attn.o_proj
    yield "self_attn.o_proj.bias", w.self_attn.o_bias
    yield "post_attention_layernorm.weight", w.post_attention_layernorm
    for name in ("gate", "up", "down"):
        yield f"mlp.{name}_proj.weight", getattr(w.mlp, f"{name}_proj")
        yield f"mlp.{name}_proj.bias", getattr(w.mlp, f"{name}_bias")
