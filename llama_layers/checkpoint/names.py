"""The names of a model's modules and tensors in Hugging Face's, Meta's and GGUF's words.

Inside this package a tensor has the name that Hugging Face gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llama_layers.model.tensor_names import expected_tensors

__all__ = ["expected_tensors"]  # for the package

# Modules, in the order of a forward pass: Hugging Face, Meta, GGUF. {} is the number of a layer.
MODULES = [
    line.split()
    for line in """
model.embed_tokens                           tok_embeddings             token_embd
model.layers.{}.input_layernorm              layers.{}.attention_norm   blk.{}.attn_norm
model.layers.{}.self_attn.q_proj             layers.{}.attention.wq     blk.{}.attn_q
model.layers.{}.self_attn.k_proj             layers.{}.attention.wk     blk.{}.attn_k
model.layers.{}.self_attn.v_proj             layers.{}.attention.wv     blk.{}.attn_v
model.layers.{}.self_attn.q_norm             -                          blk.{}.attn_q_norm
model.layers.{}.self_attn.k_norm             -                          blk.{}.attn_k_norm
model.layers.{}.self_attn.o_proj             layers.{}.attention.wo     blk.{}.attn_output
model.layers.{}.post_attention_layernorm     layers.{}.ffn_norm         blk.{}.ffn_norm
model.layers.{}.mlp.gate_proj                layers.{}.feed_forward.w1  blk.{}.ffn_gate
model.layers.{}.mlp.up_proj                  layers.{}.feed_forward.w3  blk.{}.ffn_up
model.layers.{}.mlp.down_proj                layers.{}.feed_forward.w2  blk.{}.ffn_down
model.norm                                   norm                       output_norm
lm_head                                      output                     output
""".strip().splitlines()
]
META_NAMES = {hugging_face: meta for hugging_face, meta, _ in MODULES if meta != "-"}
GGUF_NAMES = {hugging_face: gguf for hugging_face, _, gguf in MODULES}
_TO_HUGGING_FACE = {
    "meta": {meta: hugging_face for hugging_face, meta in META_NAMES.items()},
    "gguf": {gguf: hugging_face for hugging_face, gguf in GGUF_NAMES.items()},
}


def telling_names(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The first name that only Meta gives, and the first that only Hugging Face gives."""
    # The last norm of Meta's is also that of a Hugging Face model without its prefix.
    names = [name for name in names if name != "norm.weight"]
    meta = next((name for name in names if renamed(name, _TO_HUGGING_FACE["meta"])), None)
    return meta, next((name for name in names if renamed(name, META_NAMES)), None)


def to_hugging_face(name: str, convention: str) -> str:
    """The Hugging Face name for a name of "meta" or "gguf"; other names stay as they are."""
    return renamed(name, _TO_HUGGING_FACE[convention]) or name


def renamed(name: str, modules: dict[str, str]) -> str | None:
    """The name of a tensor after its module was looked up in a table; None if it is not there."""
    module, _, kind = name.rpartition(".")
    numbered = re.fullmatch(r"((?:model\.layers|layers|blk)\.)(0|[1-9]\d*)(\..+)", module)
    template = f"{numbered[1]}{{}}{numbered[3]}" if numbered else module
    found = modules.get(template)
    if found is None or ("{}" in template) != bool(numbered):
        return None
    return f"{found.format(numbered[2]) if numbered else found}.{kind}"
