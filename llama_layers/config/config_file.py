"""The content of config.json: what the files of several years say, in the words of one.

What a file means is what transformers' class of its ``model_type`` makes of it; keys that the class
does not read are passed over (`llama_layers.config.refusals` says which of them are refused).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_layers.config.checks import check_count, check_flag, check_layer_count
from llama_layers.config.families import FAMILIES, unread_fields
from llama_layers.config.family import Family, Key
from llama_layers.config.keys import Keys
from llama_layers.config.refusals import (
    refuse_draft_heads,
    refuse_later_tokens,
    refuse_quantised,
)
from llama_layers.config.rope_keys import OF_LAYERS, read_rope
from llama_layers.config.unsupported import but_it_has
from llama_layers.errors import ConfigError, shown

# A file must have its family, its sizes, and eps, which no published file leaves out.
_REQUIRED = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
max_position_embeddings rms_norm_eps model_type
""".split()
_OPTIONAL = """
num_key_value_heads head_dim hidden_act tie_word_embeddings bos_token_id eos_token_id pad_token_id
""".split()

# The key under which `LlamaConfig.to_json` puts fields that the family's class does not read.
OWN_KEY = "llama_layers"

# Other names of dtypes.
_DTYPES = {"half": "float16", "float": "float32", "double": "float64"}


def constructor_arguments(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `LlamaConfig` for the content of a config.json, and what was not read."""
    if bad := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(f"config: expected keys that are strings, got {shown(bad[0])}")
    keys = Keys(content)
    required = {key: keys.get(key) for key in _REQUIRED}
    if required["max_position_embeddings"] is None:  # Llama 1 has the older name
        required["max_position_embeddings"] = keys.get("max_sequence_length")
    family = _family(required, content)
    refuse_draft_heads(content)
    refuse_quantised(content)
    refuse_later_tokens(content)
    optional = {field: _read(keys, field, family) for field in [*_OPTIONAL, *family.reads]}
    other_names = _under_other_names(content, keys, family)
    _check_required(required := {**required, **other_names})
    arguments = {**optional, **required, "dtype": _dtype(keys)}
    if arguments["hidden_act"] == "swish":  # another name of the same function
        arguments["hidden_act"] = "silu"
    for key, needed in family.needs.items():
        if (found := keys.get(key)) not in (None, needed):
            raise ConfigError(f"{key}: expected {needed} or nothing, got {shown(found)}")
    if family.switches_window:
        _switch_window(arguments, keys, family)
    _name_layer_types(arguments, keys, family)
    unread_words = read_rope(arguments, keys, family)
    given = {key: value for key, value in arguments.items() if value is not None}
    own = _own_fields(keys, required["model_type"])
    return given | own, keys.unread() | unread_words


def _read(keys: Keys, field: str, family: Family) -> Any:
    """The value of a field that a key says; None if it is not said."""
    key = family.keys.get(field) or Key(field)
    said = keys.get(key.name, family.defaults.get(key.name))
    return None if said is None else key.read(said)


def _under_other_names(content: Mapping[str, Any], keys: Keys, family: Family) -> dict[str, Any]:
    """The values of fields that a file gives under names of its family's own."""
    found = {}
    for key, names in family.other_keys.items():
        if (value := keys.get(key)) is None:
            continue
        for name in names:
            if content.get(name) not in (None, value):
                raise ConfigError(
                    f"{name}: expected {shown(value)}, as {key} says, got {shown(content[name])}"
                )
            found[name] = value
    return found


def _family(required: Mapping[str, Any], content: Mapping[str, Any]) -> Family:
    name = required["model_type"]
    if name is None:
        _check_required(required)
    if not isinstance(name, str) or name not in FAMILIES:
        why = but_it_has(name, content) if isinstance(name, str) else ""
        raise ConfigError(
            f"model_type: expected one of {', '.join(FAMILIES)}, got {shown(name)}{why}"
        )
    return FAMILIES[name]


def _check_required(required: Mapping[str, Any]) -> None:
    if missing := [key for key, value in required.items() if value is None]:
        families = f" (one of {', '.join(FAMILIES)})" if "model_type" in missing else ""
        raise ConfigError(f"config: missing {', '.join(missing)}{families}")


def _own_fields(keys: Keys, model_type: str) -> dict[str, Any]:
    own = keys.get(OWN_KEY) or {}
    names = unread_fields(model_type)
    if FAMILIES[model_type].rope != "same":
        names |= OF_LAYERS
    if not isinstance(own, Mapping) or not own.keys() <= names:
        raise ConfigError(
            f"{OWN_KEY}: expected an object with {', '.join(sorted(names))}, got {shown(own)}"
        )
    return dict(own)


def _dtype(keys: Keys) -> object:
    """The dtype that a file names, under its newer key first."""
    said = [keys.get(key) for key in ("dtype", "torch_dtype")]
    dtype = next((word for word in said if word not in (None, "auto")), None)
    if isinstance(dtype, str):
        dtype = dtype.removeprefix("torch.")
        return _DTYPES.get(dtype, dtype)
    return dtype


def _name_layer_types(arguments: dict[str, Any], keys: Keys, family: Family) -> None:
    """Say the types of layers where a file does not."""
    said, pattern = {}, "sliding_window_pattern"
    if pattern in family.defaults:
        said["every"] = keys.get(pattern, family.defaults[pattern])
    if family.layer_types is None or arguments["layer_types"] is not None:
        return
    if said:
        check_count(pattern, said["every"])
    layers = arguments["num_hidden_layers"]
    check_layer_count("num_hidden_layers", layers)
    arguments["layer_types"] = family.layer_types(layers, **said)


def _switch_window(arguments: dict[str, Any], keys: Keys, family: Family) -> None:
    """Say with sliding_window and layer_types what Qwen2 says with two keys more."""
    full_layers = keys.get("max_window_layers", family.defaults["max_window_layers"])
    use_window = keys.get("use_sliding_window")
    check_flag("use_sliding_window", use_window := False if use_window is None else use_window)
    if not use_window:
        arguments["sliding_window"] = None
    elif arguments["layer_types"] is None and arguments["sliding_window"] is not None:
        if full_layers is None:
            raise ConfigError("config: missing max_window_layers, and use_sliding_window is true")
        layers = arguments["num_hidden_layers"]
        check_layer_count("num_hidden_layers", layers)
        if full_layers != 0:
            check_count("max_window_layers", full_layers)
            arguments["layer_types"] = [
                "full_attention" if layer < full_layers else "sliding_attention"
                for layer in range(layers)
            ]
