"""What a GGUF file says of windows and RoPE, layer by layer, and what llama.cpp knows by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_layers.checkpoint.gguf.metadata import Section, shown
from llama_layers.checkpoint.gguf.rope import decimal
from llama_layers.config.checks import check_layer_count

_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_SLIDING, _FULL = "sliding_attention", "full_attention"
# The family, where it is not called as the architecture.
_FAMILIES = {
    "chatglm": "glm",
    "gemma3": "gemma3_text",
    "hunyuan-dense": "hunyuan_v1_dense",
    "mistral3": "ministral3",
}
# The families in which llama.cpp has windows, and of how many layers the last has none if the file
# does not say.
_EVERY = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4, "exaone4": 4, "granite_swa": None}
# The windows that files need not say: Gemma 2's, and EXAONE 4's with that many layers.
_GEMMA_WINDOW = 4096
_EXAONE_LAYERS, _EXAONE_WINDOW = 64, 4096
# The theta of layers with a window if the file does not say, where it is not that of the others.
_SLIDING_THETA = {"gemma3_text": 10000.0}
# The families in which RoPE is not scaled in layers with a window.
_UNSCALED = frozenset({"gemma3_text", "olmo3"})


def model_type_of(architecture: str, own: Section) -> str:
    """The family of an architecture: OLMo 3 is an OLMo 2 with a window."""
    if architecture == "olmo2" and own.integer(_WINDOW, 0):
        return "olmo3"
    return _FAMILIES.get(architecture, architecture)


def fields_of_layers(model_type: str, own: Section, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that say which layers have a window, and which have RoPE.

    `rope` has the fields of RoPE that are the same in all layers.
    """
    layers, theta = own.integer("block_count"), rope["rope_theta"]
    check_layer_count("num_hidden_layers", layers)
    if model_type == "granite" and not own.flag("rope.scaling.finetuned", True):
        return {"layer_rope_theta": (0.0,) * layers}  # llama.cpp has no other key for it
    if model_type == "phi3" and (window := own.integer(_WINDOW)):
        return {"sliding_window": window}  # of all layers in transformers; llama.cpp ignores it
    if model_type not in _EVERY:
        return {}
    window = own.integer(_WINDOW, _usual_window(model_type, layers))
    types = _types(own, layers, _EVERY[model_type])
    if not window:
        return {}
    fields: dict[str, Any] = {"sliding_window": window, "layer_types": types}
    thetas = _thetas(model_type, own, types, theta)
    if set(thetas) != {theta}:
        fields["layer_rope_theta"] = thetas
    if model_type in _UNSCALED and rope["rope_scaling"] is not None:
        fields["sliding_rope_scaling"] = False
    return fields


def _usual_window(model_type: str, layers: int) -> int:
    """The window if a file does not say; 0 for none."""
    if model_type == "gemma2":
        return _GEMMA_WINDOW
    return _EXAONE_WINDOW if (model_type, layers) == ("exaone4", _EXAONE_LAYERS) else 0


def _thetas(model_type: str, own: Section, types: Sequence[str], theta: float) -> tuple[float, ...]:
    """The theta of each layer; 0 where it has no RoPE."""
    if model_type == "granite_swa":
        rotated = _flags(own, "attention.rope_pattern", len(types))
        return tuple(theta if has_rope else 0.0 for has_rope in rotated)
    usual = _SLIDING_THETA.get(model_type, theta)
    sliding = decimal(own.number("rope.freq_base_swa", usual))
    full = 0.0 if model_type == "exaone4" else theta
    return tuple(sliding if kind == _SLIDING else full for kind in types)


def _types(own: Section, layers: int, every: int | None) -> tuple[str, ...]:
    """The types of layers, from a flag for each or from how often one has no window."""
    if every is None:
        own.expect(_PATTERN)
    if every is None or isinstance(own.get(_PATTERN), np.ndarray):
        slides = _flags(own, _PATTERN, layers)
    else:
        every = own.integer(_PATTERN, every, f"an integer, or a flag for each of {layers} layers")
        slides = tuple(not every or layer % every < every - 1 for layer in range(layers))
    return tuple(_SLIDING if flag else _FULL for flag in slides)


def _flags(own: Section, key: str, layers: int) -> tuple[bool, ...]:
    """A flag for each layer; all true if they are not there."""
    said = own.get(key, np.ones(layers, bool))
    if not isinstance(said, np.ndarray) or said.dtype.kind not in "biu" or said.size != layers:
        raise own.error(key, f"expected a flag for each of {layers} layers, got {shown(said)}")
    return tuple(map(bool, said.tolist()))
