"""What Hugging Face calls a model's arrays, and weights from arrays by those names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.weights import (
    AttentionWeights,
    LayerWeights,
    LlamaWeights,
    MLPWeights,
    QKVWeights,
)

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

Names = tuple[str, ...]
"""Tensors that become one array, their rows below each other; or one alone."""

# Buffers that exporters save and transformers' classes do not read. What RoPE and masks need
# follows from the config, and a scale of keys or values is for caches of 8 bits.
_INERT = re.compile(
    r"(.*\.)?("
    r"rotary_emb\.\w+|rope\.freqs|freqs_cis|cos_cached|sin_cached|masked_bias|"
    r"self_attn\.(\w+\.)?(k|v|kv)_scale"
    r")"
)


def is_inert(name: str) -> bool:
    """Whether a tensor of that name changes no number of the model."""
    return _INERT.fullmatch(name) is not None


def expected_tensors(config: LlamaConfig, /) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of a config must hold.

    Parameters
    ----------
    config : LlamaConfig
        Its numbers.

    Returns
    -------
    dict of str to tuple of int
        Hugging Face names and shapes, in the order in which `convert` writes them: the query, key
        and value rows of a layer next to each other, so that they map into memory as one matrix.

    Examples
    --------
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.checkpoint import expected_tensors
    >>> shapes = expected_tensors(LlamaConfig.llama3_1_8b())
    >>> len(shapes), shapes["model.layers.0.self_attn.k_proj.weight"]
    (291, (1024, 4096))
    """
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_tensors(config, layer)
    shapes[NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_tensors(config: LlamaConfig, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {prefix + "input_layernorm.weight": (hidden,)}
    rows = (queries, keys, keys)
    shapes |= {name: (n, hidden) for name, n in zip(qkv_names(layer), rows, strict=True)}
    if config.qkv_bias:
        shapes |= {name: (n,) for name, n in zip(qkv_names(layer, "bias"), rows, strict=True)}
    shapes[prefix + "self_attn.o_proj.weight"] = (hidden, queries)
    if config.o_bias:
        shapes[prefix + "self_attn.o_proj.bias"] = (hidden,)
    shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    for name, shape in (
        ("gate_proj", (inner, hidden)),
        ("up_proj", (inner, hidden)),
        ("down_proj", (hidden, inner)),
    ):
        shapes[f"{prefix}mlp.{name}.weight"] = shape
        if config.mlp_bias:
            shapes[f"{prefix}mlp.{name}.bias"] = shape[:1]
    return shapes


def qkv_names(layer: int, kind: str = "weight") -> Names:
    """The names of a layer's query, key and value tensors, in the order of fused rows."""
    return tuple(f"model.layers.{layer}.self_attn.{x}_proj.{kind}" for x in "qkv")


def layer_weights(array: Callable[[Names], Any], config: LlamaConfig, layer: int) -> LayerWeights:
    """A layer from a function that gives the array of some of the `expected_tensors`."""

    def get(name: str, there: bool = True) -> Any:
        return array((f"model.layers.{layer}.{name}",)) if there else None

    return LayerWeights(
        input_layernorm=get("input_layernorm.weight"),
        self_attn=AttentionWeights(
            qkv=QKVWeights(
                array(qkv_names(layer)),
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                bias=array(qkv_names(layer, "bias")) if config.qkv_bias else None,
            ),
            o_proj=get("self_attn.o_proj.weight"),
            o_bias=get("self_attn.o_proj.bias", config.o_bias),
        ),
        post_attention_layernorm=get("post_attention_layernorm.weight"),
        mlp=MLPWeights(
            gate_proj=get("mlp.gate_proj.weight"),
            up_proj=get("mlp.up_proj.weight"),
            down_proj=get("mlp.down_proj.weight"),
            gate_bias=get("mlp.gate_proj.bias", config.mlp_bias),
            up_bias=get("mlp.up_proj.bias", config.mlp_bias),
            down_bias=get("mlp.down_proj.bias", config.mlp_bias),
        ),
    )


def llama_weights(array: Callable[[Names], Any], config: LlamaConfig) -> LlamaWeights:
    """A model's weights from a function that gives the array of some of the `expected_tensors`."""
    embedding = array((EMBEDDING,))
    return LlamaWeights(
        embed_tokens=embedding,
        layers=[layer_weights(array, config, i) for i in range(config.num_hidden_layers)],
        norm=array((NORM,)),
        lm_head=embedding if config.tie_word_embeddings else array((HEAD,)),
    )
