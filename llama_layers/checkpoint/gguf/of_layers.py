"""What a GGUF file says of windows and RoPE, layer by layer, and what llama.cpp knows by itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_layers.checkpoint.gguf.metadata import Section, shown
from llama_layers.config.family import last_of_several_full

_FULL_EVERY = 4
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
# The family, where it is not called as the architecture.
_FAMILIES = {
    "gemma3": "gemma3_text",
    "hunyuan-dense": "hunyuan_v1_dense",
    "mistral3": "ministral3",
}
# The window of EXAONE 4 with that many layers, whose files need not say it.
_EXAONE_LAYERS, _EXAONE_WINDOW = 64, 4096


def model_type_of(architecture: str, own: Section) -> str:
    """The family of an architecture: OLMo 3 is an OLMo 2 with a window."""
    if architecture == "olmo2" and own.integer(_WINDOW, 0):
        return "olmo3"
    return _FAMILIES.get(architecture, architecture)


def fields_of_layers(model_type: str, own: Section, layers: int, theta: float) -> dict[str, Any]:
    """The fields of a config that say which layers have a window, and which have RoPE."""
    if model_type not in ("olmo3", "exaone4"):
        return {}
    usual = _EXAONE_WINDOW if (model_type, layers) == ("exaone4", _EXAONE_LAYERS) else 0
    window = own.integer(_WINDOW, usual)
    types = _types(own, layers)
    if not window:
        return {}
    fields: dict[str, Any] = {"sliding_window": window, "layer_types": types}
    if model_type == "exaone4":
        fields["layer_rope_theta"] = tuple(
            theta if kind == "sliding_attention" else 0.0 for kind in types
        )
    elif own.text("rope.scaling.type", "none") != "none":
        fields["sliding_rope_scaling"] = False
    return fields


def _types(own: Section, layers: int) -> tuple[str, ...]:
    """The types of layers, as llama.cpp takes them if the file does not say."""
    said = own.get(_PATTERN)
    if said is None:
        return tuple(last_of_several_full(layers, every=_FULL_EVERY))
    if not isinstance(said, np.ndarray) or said.dtype.kind not in "biu" or said.size != layers:
        raise own.error(_PATTERN, f"expected a flag for each of {layers} layers, got {shown(said)}")
    return tuple("sliding_attention" if flag else "full_attention" for flag in said)
