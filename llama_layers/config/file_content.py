"""The content of a config.json that says what a config says."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from llama_layers.config.config_file import OWN_KEY
from llama_layers.config.families import FAMILIES, family_switches, unread_fields
from llama_layers.config.fields import Fields


def file_content(config: Fields) -> dict[str, Any]:
    """The content of a file that `LlamaConfig.from_json` reads as this config."""
    family, unread = FAMILIES[config.model_type], unread_fields(config.model_type)
    built_in = family_switches(config.model_type)
    content: dict[str, Any] = {"architectures": [family.architecture]}
    own = {}
    for field in fields(config):
        value = getattr(config, field.name)
        value = list(value) if isinstance(value, tuple) else value
        if field.name not in unread:
            content[field.name] = value
        elif value != built_in.get(field.name, field.default):
            own[field.name] = value
    if config.rope_scaling is not None:
        content["rope_scaling"] = {
            key: value for key, value in vars(config.rope_scaling).items() if value is not None
        }
    content["torch_dtype"] = content.pop("dtype")
    if family.switches_window:
        content["use_sliding_window"] = config.sliding_window is not None
        content["max_window_layers"] = 0  # the number of layers before the first with a window
    if config.layer_types is None:
        content.pop("layer_types", None)
    if own:
        content[OWN_KEY] = own
    return content
