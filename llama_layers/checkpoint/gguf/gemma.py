"""What GGUF files of Gemma say and what llama.cpp knows of them."""

from __future__ import annotations

from typing import Any

from llama_layers.checkpoint.gguf.metadata import Section
from llama_layers.checkpoint.gguf.rope import decimal
from llama_layers.config.checks import check_layer_count
from llama_layers.config.family import last_of_several_full

# Every how many layers one has no window, and the number of layers of the 27B, whose scores are
# scaled by another width than that of their heads.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# The window and the caps where a file does not say.
_USUAL = {"gemma2": (4096, 50.0, 30.0), "gemma3": (0, 0.0, 0.0)}


def gemma_fields(architecture: str, own: Section, layers: int) -> dict[str, Any]:
    """The fields of a config that other architectures do not have.

    The files hold the weights of norms with 1 added, and the factor of the embedding is not rounded
    to their dtype.
    """
    fields: dict[str, Any] = {"norm_weight_offset": 0.0, "embedding_multiplier_rounded": False}
    if architecture == "gemma":
        return fields
    check_layer_count("num_hidden_layers", layers)
    if layers == _LAYERS_OF_27B[architecture]:
        width = own.integer("embedding_length") // own.integer("attention.head_count")
        fields["attention_multiplier"] = width**-0.5
    window, of_scores, of_logits = _USUAL[architecture]
    if architecture == "gemma2":
        fields["attn_logit_softcapping"] = (
            decimal(own.number("attn_logit_softcapping", of_scores)) or None
        )
    fields["final_logit_softcapping"] = (
        decimal(own.number("final_logit_softcapping", of_logits)) or None
    )
    if not (window := own.integer("attention.sliding_window", window)):
        return fields
    types = last_of_several_full(layers, every=_FULL_EVERY[architecture])
    fields |= {"sliding_window": window, "layer_types": types}
    if architecture == "gemma3":
        thetas = {
            "full_attention": decimal(own.number("rope.freq_base", 10000.0)),
            "sliding_attention": decimal(own.number("rope.freq_base_swa", 10000.0)),
        }
        fields["layer_rope_theta"] = [thetas[kind] for kind in types]
        fields["sliding_rope_scaling"] = False
    return fields
