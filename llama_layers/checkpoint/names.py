"""What a model's tensors are called, in Hugging Face's, Meta's and GGUF's words, and their shapes.

Inside this package a tensor has the name that Hugging Face gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.model.weight_names import expected_tensors

__all__ = ["expected_tensors"]  # for the package

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
META_NAMES = {hugging_face: meta for hugging_face, meta, _ in _MODULES}
_TO_HUGGING_FACE = {
    "meta": {meta: hugging_face for hugging_face, meta, _ in _MODULES},
    "gguf": {gguf: hugging_face for hugging_face, _, gguf in _MODULES},
}
_HUGGING_FACE = {hugging_face for hugging_face, _, _ in _MODULES}


def telling_names(names: Iterable[str]) -> tuple[str | None, str | None]:
    """A name that only Meta gives and one that only Hugging Face gives, where there are such."""
    # The last norm of Meta's is also that of a Hugging Face model without its prefix.
    names = [name for name in names if name != "norm.weight"]
    meta = next((name for name in names if to_hugging_face(name, "meta") != name), None)
    hugging_face = next((name for name in names if _key(name)[0] in _HUGGING_FACE), None)
    return meta, hugging_face


def to_hugging_face(name: str, convention: str) -> str:
    """The Hugging Face name for a name of "meta" or "gguf"; the name itself if it is none."""
    key, number = _key(name)
    if key not in _TO_HUGGING_FACE[convention]:
        return name
    return f"{_TO_HUGGING_FACE[convention][key].replace('{}', number)}.{name.rpartition('.')[2]}"


def _key(name: str) -> tuple[str, str]:
    """The module of a name as `_MODULES` has it, and the number of its layer or ""."""
    module = name.rpartition(".")[0]
    numbered = re.fullmatch(r"((?:model\.layers|layers|blk)\.)(0|[1-9]\d*)(\..+)", module)
    if numbered is not None:
        return f"{numbered[1]}{{}}{numbered[3]}", numbered[2]
    return module if "{" not in module else "", ""


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
