"""What a model's tensors are called, in Hugging Face's, Meta's and GGUF's words, and their shapes.

Inside this package a tensor has the name that Hugging Face gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llama_layers.config import LlamaConfig

# Modules, in the order of a forward pass: Hugging Face, Meta, GGUF.
_MODULES = [
    line.split()
    for line in """
model.embed_tokens                           tok_embeddings             token_embd
model.layers.{}.input_layernorm              layers.{}.attention_norm   blk.{}.attn_norm
model.layers.{}.self_attn.q_proj             layers.{}.attention.wq     blk.{}.attn_q
model.layers.{}.self_attn.k_proj             layers.{}.attention.wk     blk.{}.attn_k
model.layers.{}.self_attn.v_proj             layers.{}.attention.wv     blk.{}.attn_v
model.layers.{}.self_attn.o_proj             layers.{}.attention.wo     blk.{}.attn_output
model.layers.{}.post_attention_layernorm     layers.{}.ffn_norm         blk.{}.ffn_norm
model.layers.{}.mlp.gate_proj                layers.{}.feed_forward.w1  blk.{}.ffn_gate
model.layers.{}.mlp.up_proj                  layers.{}.feed_forward.w3  blk.{}.ffn_up
model.layers.{}.mlp.down_proj                layers.{}.feed_forward.w2  blk.{}.ffn_down
model.norm                                   norm                       output_norm
lm_head                                      output                     output
""".strip().splitlines()
]
_TO_HUGGING_FACE = {
    "meta": {meta: hugging_face for hugging_face, meta, _ in _MODULES},
    "gguf": {gguf: hugging_face for hugging_face, _, gguf in _MODULES},
}

# RoPE frequencies: they follow from the config, and old exporters saved them all the same.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs")


def is_meta(names: Iterable[str]) -> bool:
    """Whether names are of Meta's own releases."""
    return "tok_embeddings.weight" in names


def to_hugging_face(name: str, convention: str) -> str:
    """The Hugging Face name for a name of "meta" or "gguf"; the name itself if it is none."""
    module, dot, kind = name.rpartition(".")
    numbered = re.fullmatch(r"((?:layers|blk)\.)(0|[1-9]\d*)(\..+)", module)
    key = f"{numbered[1]}{{}}{numbered[3]}" if numbered else module
    if key not in _TO_HUGGING_FACE[convention] or ("{}" in key) != (numbered is not None):
        return name
    found = _TO_HUGGING_FACE[convention][key]
    return (found.format(numbered[2]) if numbered else found) + dot + kind


def to_gguf(name: str) -> str:
    """GGUF's name for a Hugging Face name."""
    module, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    for gguf, hugging_face in _TO_HUGGING_FACE["gguf"].items():
        if number and hugging_face.replace("{}", number[1]) == module:
            return f"{gguf.replace('{}', number[1])}.{kind}"
        if hugging_face == module:
            return f"{gguf}.{kind}"
    raise ValueError(f"name: expected that of a model's tensor, got {name!r}")


def is_derived(name: str) -> bool:
    """Whether a tensor holds only what follows from the config."""
    return _DERIVED.fullmatch(name) is not None


def qkv_names(layer: int, kind: str = "weight") -> list[str]:
    """The names of a layer's query, key and value tensors, in the order of fused rows."""
    return [f"model.layers.{layer}.self_attn.{x}_proj.{kind}" for x in "qkv"]


def permuted_heads(name: str, config: LlamaConfig) -> int | None:
    """In how many heads rows come interleaved in Meta's order; None for tensors without RoPE."""
    if re.search(r"\.self_attn\.q_proj\.", name):
        return config.num_attention_heads
    if re.search(r"\.self_attn\.k_proj\.", name):
        return config.num_key_value_heads
    return None


def deinterleave(array: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """Rows in Meta's order (pairs of a rotation adjacent) to Hugging Face's (half a head apart).

    Row 2i + j of a head becomes its row i + j * head_dim / 2.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def interleave(array: NDArray[np.generic], heads: int) -> NDArray[np.generic]:
    """The reverse of `deinterleave`."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


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
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size)
    }
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_tensors(config, layer)
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
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
