"""The config that the metadata of a trace holds, beside that of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError
from llama_layers.model.padding import padding

# Fields that change no array of a trace, or say for several layers what is compared layer by layer.
# A GGUF file holds Gemma's weights with the offset added, and its factor is rounded by no dtype.
_FREE = frozenset(
    """
    dtype bos_token_id eos_token_id pad_token_id model_type attention_bias attention_out_bias
    norm_weight_offset embedding_multiplier_rounded sliding_window layer_types
    rope_theta rope_scaling layer_rope_theta sliding_rope_scaling
    """.split()
)


def stated_config(metadata: Mapping[str, str]) -> LlamaConfig | None:
    """Return the config that the metadata of a trace holds."""
    if "config" not in metadata:
        return None
    try:
        content = json.loads(metadata["config"])
        if not isinstance(content, dict):
            raise TypeError(f"a JSON {type(content).__name__}")
        return LlamaConfig.from_json(content)
    except RecursionError:
        raise TraceError(
            "metadata config: expected a config.json, got one nested too deeply"
        ) from None
    except (ValueError, TypeError) as error:
        raise TraceError(f"metadata config: expected a config.json, got {error}") from None


def check_stated_config(metadata: Mapping[str, str], config: LlamaConfig) -> None:
    """Raise TraceError if a trace says that it is of a model with other numbers."""
    stated = stated_config(metadata)
    if stated is None:
        return
    if len(stated.rope_kinds) != len(config.rope_kinds):
        _refuse("num_hidden_layers", config.num_hidden_layers, stated.num_hidden_layers)
    ours, theirs = _meaning(config), _meaning(stated)
    for name, value in ours.items():
        if name == "vocab_size" and padding(stated.vocab_size, config.vocab_size):
            continue  # with rows of padding in the embedding, which Hugging Face counts
        if theirs[name] != value:
            _refuse(name, value, theirs[name])


def _refuse(name: str, ours: object, theirs: object) -> None:
    raise TraceError(f"trace: expected one of this model, with {name} {ours!r}, got {theirs!r}")


def _meaning(config: LlamaConfig) -> dict[str, Any]:
    """What a config says of the maths, whichever of its fields say it."""
    found = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _FREE}
    if FAMILIES[config.model_type].modules:
        found["model_type"] = config.model_type  # which says what norms are called
    found |= {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.o_bias,
        "attention_multiplier": config.attention_scale,
        "multiplies_logits": config.multiplies_logits and config.logits_scaling != 1,
    }
    for layer in range(config.num_hidden_layers):
        rope = config.rope_of(layer)
        found[f"sliding_window of layer {layer}"] = config.window_of(layer)
        found[f"rope_theta of layer {layer}"] = rope and rope.rope_theta
        found[f"rope_scaling of layer {layer}"] = rope and rope.rope_scaling
    return found
