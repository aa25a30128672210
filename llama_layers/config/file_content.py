"""The content of a config.json that says what a config says."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from llama_layers.config.config_file import OWN_KEY, constructor_arguments
from llama_layers.config.families import FAMILIES, family_switches, unread_fields
from llama_layers.config.family import Key
from llama_layers.config.fields import Fields
from llama_layers.config.rope_keys import OF_LAYERS, rope_words


def file_content(config: Fields) -> dict[str, Any]:
    """The content of a file that `LlamaConfig.from_json` reads as this config."""
    family, unread = FAMILIES[config.model_type], unread_fields(config.model_type)
    built_in = family_switches(config.model_type, config.hidden_size)
    content: dict[str, Any] = {"architectures": [family.architecture]}
    own = {}
    for field in fields(config):
        value = getattr(config, field.name)
        value = list(value) if isinstance(value, tuple) else value
        if field.name not in unread:
            file_key = family.keys.get(field.name, Key(field.name))
            content[file_key.name] = file_key.write(value)
        elif value != built_in.get(field.name, field.default):
            own[field.name] = value
    for key, names in family.other_keys.items():
        values = [getattr(config, name) for name in names]
        if all(value == values[0] for value in values):
            content[key] = values[0]
            for name in names:
                content.pop(name, None)
                own.pop(name, None)
    for name in ("rope_theta", "rope_scaling", "llama_4_scaling_beta", "llama_4_scaling_context"):
        content.pop(name, None)
    content |= rope_words(config, family)
    content["torch_dtype"] = content.pop("dtype")
    if family.switches_window:
        content["use_sliding_window"] = config.sliding_window is not None
        content["max_window_layers"] = 0  # the number of layers before the first with a window
    if config.layer_types is None:
        content.pop("layer_types", None)
    if family.rope != "same":
        own = {name: value for name, value in own.items() if name not in OF_LAYERS}
        arguments, _ = constructor_arguments(content)
        said = type(config)(**(arguments | own))
        for name in OF_LAYERS:
            if (value := getattr(config, name)) != getattr(said, name):
                own[name] = list(value) if isinstance(value, tuple) else value
    if own:
        content[OWN_KEY] = own
    return content
