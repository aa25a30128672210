"""What GGUF files of Gemma say and what llama.cpp knows of them."""

from __future__ import annotations

from typing import Any

from llama_layers.checkpoint.gguf.metadata import Section
from llama_layers.checkpoint.gguf.rope import decimal

# The number of layers of the 27B, whose scores are scaled by another width than its heads have.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# The caps where a file does not say.
_USUAL_CAPS = {"gemma2": (50.0, 30.0), "gemma3": (0.0, 0.0)}


def gemma_fields(architecture: str, own: Section, layers: int) -> dict[str, Any]:
    """The fields of a config that other architectures do not have.

    The files hold the weights of norms with 1 added, and the factor of the embedding is not rounded
    to their dtype.
    """
    fields: dict[str, Any] = {"norm_weight_offset": 0.0, "embedding_multiplier_rounded": False}
    if architecture == "gemma":
        return fields
    if layers == _LAYERS_OF_27B[architecture]:
        width = own.integer("embedding_length") // own.integer("attention.head_count")
        fields["attention_multiplier"] = width**-0.5
    of_scores, of_logits = _USUAL_CAPS[architecture]
    if architecture == "gemma2":
        cap = decimal(own.number("attn_logit_softcapping", of_scores))
        fields["attn_logit_softcapping"] = cap or None
    cap = decimal(own.number("final_logit_softcapping", of_logits))
    fields["final_logit_softcapping"] = cap or None
    return fields
