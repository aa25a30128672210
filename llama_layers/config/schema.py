"""The schemas of config.json: what the files of several years say, in the words of one.

What a file means is what transformers' class of its ``model_type`` makes of it; keys that the class
does not read are passed over (`llama_layers.config.keys` says which of them are refused).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_layers.config.checks import check_count, check_flag, check_positive
from llama_layers.config.keys import refuse_draft_heads, refuse_quantised
from llama_layers.config.rope_scaling import RopeScaling, read_scaling
from llama_layers.errors import ConfigError, shown

# The model class of each family.
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}

# What a file must say: what it is, its sizes, and eps, which no published file leaves out.
_REQUIRED = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
max_position_embeddings rms_norm_eps
""".split()

_READ_BY_ALL = {
    *_REQUIRED,
    *"num_key_value_heads head_dim hidden_act tie_word_embeddings rope_theta".split(),
    *"bos_token_id eos_token_id pad_token_id dtype model_type".split(),
}
# Fields of `LlamaConfig` that only some families read.
_READ_BY_FAMILY = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window", "layer_types"},
    "qwen2": {"sliding_window", "layer_types"},
}
# What transformers' classes take for keys that a file leaves out; null is another matter.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
}
_DEFAULT_THETA = 10000.0

# Where `LlamaConfig.to_json` puts fields that the family's class does not read.
OWN_KEY = "llama_layers"

# Other names of keys and values that mean the same.
_DTYPES = {"half": "float16", "float": "float32", "double": "float64"}
_CONSUMED = {"architectures", "auto_map", "torch_dtype", "rope_scaling", "rope_parameters", OWN_KEY}


def constructor_arguments(file: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `LlamaConfig` for the content of a config.json, and what was not read."""
    if bad := [key for key in file if not isinstance(key, str)]:
        raise ConfigError(f"config: expected keys that are strings, got {shown(bad[0])}")
    content = dict(file)
    if content.get("max_position_embeddings") is None:  # Llama 1 has the older name
        content["max_position_embeddings"] = content.get("max_sequence_length")
    family = _family(content)
    refuse_draft_heads(file)
    refuse_quantised(file)
    _refuse_missing(content)
    content = _DEFAULTS[family] | content
    content["dtype"] = _dtype(file)
    read = _READ_BY_ALL | _READ_BY_FAMILY[family] | _CONSUMED
    if file.get("max_position_embeddings") is None:
        read.add("max_sequence_length")
    unread_words = _read_rope(content, read)
    if family == "qwen2":
        _name_qwen2_layers(content)
        read |= {"use_sliding_window", "max_window_layers"}
    if content.get("hidden_act") == "swish":  # another name of the same function
        content["hidden_act"] = "silu"
    fields = {*_READ_BY_ALL, *_READ_BY_FAMILY[family], "rope_scaling"}
    arguments = {key: content[key] for key in fields if content.get(key) is not None}
    unread = {key: value for key, value in file.items() if key not in read}
    return arguments | _own_fields(content, family), unread | unread_words


def unread_fields(model_type: str) -> set[str]:
    """The fields of `LlamaConfig` that transformers' class of a family does not read."""
    return set().union(*_READ_BY_FAMILY.values()) - _READ_BY_FAMILY[model_type]


def _family(content: Mapping[str, Any]) -> str:
    family = content.get("model_type")
    if family is None:
        _refuse_missing(content)
    if not isinstance(family, str) or family not in MODEL_TYPES:
        raise ConfigError(
            f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {shown(family)}"
        )
    return family


def _refuse_missing(content: Mapping[str, Any]) -> None:
    missing = [key for key in (*_REQUIRED, "model_type") if content.get(key) is None]
    if missing:
        families = f" (one of {', '.join(MODEL_TYPES)})" if "model_type" in missing else ""
        raise ConfigError(f"config: missing {', '.join(missing)}{families}")


def _own_fields(content: Mapping[str, Any], family: str) -> dict[str, Any]:
    own = content.get(OWN_KEY) or {}
    if not isinstance(own, Mapping) or not own.keys() <= unread_fields(family):
        raise ConfigError(
            f"{OWN_KEY}: expected an object with {', '.join(sorted(unread_fields(family)))}, got "
            f"{shown(own)}"
        )
    return dict(own)


def _dtype(file: Mapping[str, Any]) -> Any:
    """The dtype that a file names, under its newer key first."""
    for key in ("dtype", "torch_dtype"):
        if (dtype := file.get(key)) not in (None, "auto"):
            if isinstance(dtype, str):
                dtype = dtype.removeprefix("torch.")
                return _DTYPES.get(dtype, dtype)
            return dtype
    return None


def _read_rope(content: dict[str, Any], read: set[str]) -> dict[str, Any]:
    """Bring both schemas of RoPE into one, theta and scaling beside each other.

    Returns the words inside them that nothing reads.
    """
    thetas = [content.get("rope_theta")]
    scalings: list[RopeScaling | None] = []
    unread: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not (words := content.pop(key, None)):  # null, false and an empty object are plain RoPE
            continue
        if not isinstance(words, Mapping):
            raise ConfigError(f"{key}: expected an object, got {shown(words)}")
        scaling, names = read_scaling(_with_context(words, content, read))
        scalings.append(scaling)
        thetas.append(words.get("rope_theta"))
        unread |= {f"{key}.{name}": words.get(name) for name in names}
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ConfigError("rope_scaling: differs from rope_parameters")
    given = [theta for theta in thetas if theta is not None] or [_DEFAULT_THETA]
    for theta in given:
        check_positive("rope_theta", theta)
    if any(theta != given[0] for theta in given):
        raise ConfigError(
            f"rope_theta: expected one, got {' and '.join(shown(theta) for theta in given)}"
        )
    content["rope_theta"] = given[0]
    content["rope_scaling"] = scalings[0] if scalings else None
    return unread


def _with_context(
    words: Mapping[str, Any], content: Mapping[str, Any], read: set[str]
) -> Mapping[str, Any]:
    """Add the trained context where it is said outside, as in files made from Phi's."""
    name = "original_max_position_embeddings"
    kind = words.get("rope_type", words.get("type"))
    if kind not in ("yarn", "llama3"):
        return words
    outside, inside = content.get(name), words.get(name)
    read.add(name)
    if None not in (outside, inside) and outside != inside:
        raise ConfigError(f"{name}: expected one, got {shown(inside)} and {shown(outside)}")
    if (found := outside if inside is None else inside) is None and kind == "llama3":
        found = content.get("max_position_embeddings")
    return {**words, name: found}


def _name_qwen2_layers(content: dict[str, Any]) -> None:
    """Say with sliding_window and layer_types what Qwen2 says with two keys more."""
    use_window = content.get("use_sliding_window")
    check_flag("use_sliding_window", use_window := False if use_window is None else use_window)
    if not use_window:
        content["sliding_window"] = None
    elif content.get("layer_types") is None and content["sliding_window"] is not None:
        if (full_layers := content["max_window_layers"]) is None:
            raise ConfigError("config: missing max_window_layers, and use_sliding_window is true")
        check_count("num_hidden_layers", content["num_hidden_layers"])
        if full_layers != 0:
            check_count("max_window_layers", full_layers)
            content["layer_types"] = [
                "full_attention" if layer < full_layers else "sliding_attention"
                for layer in range(content["num_hidden_layers"])
            ]
