"""The names of a model's modules and tensors in Hugging Face's, Meta's and GGUF's words.

Inside this package a tensor has the name that Hugging Face gives it, in the model's family.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from llama_layers.config.families import is_renamed, module_name
from llama_layers.model.tensor_names import expected_tensors, renamed

__all__ = ["expected_tensors", "renamed"]  # for the package

# Modules, in the order of a forward pass: Hugging Face, Meta, GGUF. {} is the number of a layer.
# Hugging Face's names are those of most families; `Family` has the others.
MODULES = [
    line.split()
    for line in """
model.embed_tokens                           tok_embeddings             token_embd
model.layers.{}.input_layernorm              layers.{}.attention_norm   blk.{}.attn_norm
model.layers.{}.self_attn.qkv_proj           -                          blk.{}.attn_qkv
model.layers.{}.self_attn.q_proj             layers.{}.attention.wq     blk.{}.attn_q
model.layers.{}.self_attn.k_proj             layers.{}.attention.wk     blk.{}.attn_k
model.layers.{}.self_attn.v_proj             layers.{}.attention.wv     blk.{}.attn_v
model.layers.{}.self_attn.q_norm             -                          blk.{}.attn_q_norm
model.layers.{}.self_attn.k_norm             -                          blk.{}.attn_k_norm
model.layers.{}.self_attn.sinks              -                          blk.{}.attn_sinks
model.layers.{}.self_attn.o_proj             layers.{}.attention.wo     blk.{}.attn_output
model.layers.{}.post_self_attn_layernorm     -                          blk.{}.post_attention_norm
model.layers.{}.post_attention_layernorm     layers.{}.ffn_norm         blk.{}.ffn_norm
model.layers.{}.mlp.gate_proj                layers.{}.feed_forward.w1  blk.{}.ffn_gate
model.layers.{}.mlp.up_proj                  layers.{}.feed_forward.w3  blk.{}.ffn_up
model.layers.{}.mlp.down_proj                layers.{}.feed_forward.w2  blk.{}.ffn_down
model.layers.{}.post_mlp_layernorm           -                          blk.{}.post_ffw_norm
model.norm                                   norm                       output_norm
lm_head                                      output                     output
""".strip().splitlines()
]
_LAYER = "model.layers.{}."
# By architecture, the names in GGUF that are other modules' in the rest.
_OF_ARCHITECTURE: dict[str, dict[str, str]] = {
    "seed_oss": {"model.layers.{}.post_attention_layernorm": "blk.{}.post_attention_norm"},
}
META_NAMES = {hugging_face: meta for hugging_face, meta, _ in MODULES if meta != "-"}
GGUF_NAMES = {hugging_face: gguf for hugging_face, _, gguf in MODULES}
_FROM_META = {meta: hugging_face for hugging_face, meta in META_NAMES.items()}


def telling_names(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The first name that only Meta gives, and the first that only Hugging Face gives."""
    # The last norm of Meta's is also that of a Hugging Face model without its prefix.
    names = [name for name in names if name != "norm.weight"]
    meta = next((name for name in names if renamed(name, _FROM_META)), None)
    return meta, next((name for name in names if renamed(name, META_NAMES)), None)


def from_meta(name: str) -> str:
    """The Hugging Face name for a name of Meta's; other names stay as they are."""
    return renamed(name, _FROM_META) or name


def from_gguf(name: str, model_type: str) -> str | None:
    """The Hugging Face name for a name in a GGUF file of a family; None for other names."""
    found = renamed(name, _from_gguf(model_type))
    return found and found.replace(".sinks.weight", ".sinks")  # a parameter of attention itself


@cache
def _from_gguf(model_type: str) -> dict[str, str]:
    own = _OF_ARCHITECTURE.get(model_type, {})
    return {
        own.get(module, gguf): name
        for module, gguf in GGUF_NAMES.items()
        if (name := in_family(module, model_type)) is not None
    }


def in_family(template: str, model_type: str) -> str | None:
    """A Hugging Face name of this table with {} for the layer, as a family has it.

    None if the family does not have the module, and another of its modules has that name.
    """
    role = template.removeprefix(_LAYER)
    if role == template:
        return template
    return None if is_renamed(model_type, role) else _LAYER + module_name(model_type, role)
