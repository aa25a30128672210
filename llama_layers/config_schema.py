"""The schemas of config.json: what the files of several years say, in the words of one."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from llama_layers.errors import ConfigError

# What a file must say, whatever a constructor's defaults are.
_REQUIRED = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
max_position_embeddings rms_norm_eps rope_theta model_type
""".split()

# What files of some families must say too: transformers' defaults for them differ from Llama's.
_REQUIRED_BY_FAMILY = {
    "mistral": ["num_key_value_heads", "sliding_window"],
    "qwen2": ["num_key_value_heads"],
}

# Tables with an entry for each layer are made from a config alone: a malformed one must not fill
# the memory. Published models have up to 126.
MOST_LAYERS = 10_000

# Keys that may be missing from no file of their family, but may be null.
_NULLABLE = {"sliding_window"}

# Keys that change no number of a forward pass: bookkeeping, training, output options of
# transformers, and generation settings that old files carry.
_HARMLESS = frozenset(
    """
    architectures attention_dropout attn_implementation auto_map bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward classifier_dropout diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)


def constructor_arguments(file: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The arguments of `LlamaConfig`, whose fields are given, for the content of a config.json."""
    content = {key: value for key, value in file.items() if not key.startswith("_")}
    _merge_dtypes(content)
    _flatten_rope_parameters(content)
    family = content.get("model_type")
    if family == "llama" and content.get("rope_theta") is None and _precedes_rope_theta(content):
        content["rope_theta"] = 10000.0
    missing = [
        key
        for key in [*_REQUIRED, *_REQUIRED_BY_FAMILY.get(str(family), [])]
        if content.get(key) is None and not (key in _NULLABLE and key in content)
    ]
    if missing:
        hint = " (10000.0 for Llama 1 and 2)" if "rope_theta" in missing else ""
        there = [key for key in content if key not in fields and key not in _HARMLESS]
        beside = f"; unknown beside that: {', '.join(there)}" if there else ""
        raise ConfigError(f"config: missing {', '.join(missing)}{hint}{beside}")
    if family == "qwen2":
        _name_qwen2_layers(content)
    if content.pop("rope_interleaved", False):
        raise ConfigError("rope_interleaved: expected false or nothing, got true")
    if (part := content.pop("partial_rotary_factor", None)) not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor: expected 1.0 or nothing, got {part!r}")
    given = {key: value for key, value in content.items() if value is not None}
    unknown = [key for key in given if key not in fields and key not in _HARMLESS]
    if unknown:
        raise ConfigError(
            f"config: unknown {', '.join(f'{key} = {given[key]!r}' for key in unknown)}; "
            f"if you know that it changes no number, remove it"
        )
    return {key: value for key, value in given.items() if key in fields}


def scaling_arguments(scaling: Any) -> dict[str, Any] | None:
    """The arguments of `RopeScaling` for a ``rope_scaling`` object; None for plain RoPE."""
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope_scaling: expected an object, got {scaling!r}")
    given = {key: value for key, value in scaling.items() if value is not None}
    kinds = {str(given.pop(key)) for key in ("type", "rope_type") if key in given}
    if len(kinds) > 1:
        raise ConfigError(f"rope_type: expected one, got {' and '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default"
    if (part := given.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"partial_rotary_factor: expected 1.0 or nothing, got {part!r}")
    if kind != "default":
        return {"rope_type": kind, **given}
    if given:
        raise ConfigError(f"rope_scaling: default does not read {', '.join(sorted(given))}")
    return None


def check_count(name: str, value: Any) -> None:
    """Refuse what is no positive integer, and more layers than there is a use for."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected a positive integer, got {value!r}")
    if name == "num_hidden_layers" and value > MOST_LAYERS:
        raise ConfigError(f"{name}: expected at most {MOST_LAYERS}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{name}: expected a positive finite number, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {value!r}")


def _merge_dtypes(content: dict[str, Any]) -> None:
    dtypes = [content.pop(key, None) for key in ("torch_dtype", "dtype")]
    given = [dtype for dtype in dtypes if dtype not in (None, "auto")]
    if given and given[0] != given[-1]:
        raise ConfigError(f"dtype: expected one, got {given[0]!r} and {given[-1]!r}")
    content["dtype"] = given[0] if given else None


def _flatten_rope_parameters(content: dict[str, Any]) -> None:
    """Bring the nested schema into the flat one: theta and scaling beside each other."""
    nested = content.pop("rope_parameters", None)
    if nested is not None:
        if not isinstance(nested, Mapping):
            raise ConfigError(f"rope_parameters: expected an object, got {nested!r}")
        scaling = dict(nested)
        theta = scaling.pop("rope_theta", None)
        if content.get("rope_theta") is None:
            content["rope_theta"] = theta
        elif theta not in (None, content["rope_theta"]):
            raise ConfigError(
                f"rope_theta: expected one, got {content['rope_theta']!r} and {theta!r}"
            )
        if content.get("rope_scaling") is None:
            content["rope_scaling"] = scaling
        elif scaling_arguments(content["rope_scaling"]) != scaling_arguments(scaling):
            raise ConfigError("rope_scaling: differs from rope_parameters")
    if content.get("rope_scaling") is not None:
        content["rope_scaling"] = scaling_arguments(content["rope_scaling"])


def _precedes_rope_theta(content: dict[str, Any]) -> bool:
    """Whether a file is from before transformers 4.33, the first with a key for theta."""
    try:
        major, minor = (
            int(part) for part in str(content.get("transformers_version")).split(".")[:2]
        )
    except ValueError:
        return False
    return (major, minor) < (4, 33)


def _name_qwen2_layers(content: dict[str, Any]) -> None:
    """Say with sliding_window and layer_types what Qwen2 says with two keys more."""
    use_window = content.pop("use_sliding_window", False)
    full_layers = content.pop("max_window_layers", None)
    check_flag("use_sliding_window", use_window)
    if not use_window:
        content["sliding_window"] = None
    elif content.get("layer_types") is None:
        if full_layers is None:
            raise ConfigError("config: missing max_window_layers, and use_sliding_window is true")
        check_count("num_hidden_layers", content["num_hidden_layers"])
        if full_layers != 0:
            check_count("max_window_layers", full_layers)
            content["layer_types"] = [
                "full_attention" if layer < full_layers else "sliding_attention"
                for layer in range(content["num_hidden_layers"])
            ]
