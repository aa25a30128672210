"""The config that a GGUF file's metadata amounts to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.config import LlamaConfig
from llama_layers.errors import ConfigError
from llama_layers.rope import inv_freq
from llama_layers.rope_scaling import RopeScaling

# Mistral's files say llama. llama.cpp's own converter permutes Q and K for llama only.
ARCHITECTURES = ("llama", "qwen2")

# Keys without the architecture in front, and the config's field. What is None is read below.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
    "attention.value_length": None,
    "rope.dimension_count": None,
    "rope.scaling.type": None,
    "rope.scaling.factor": None,
    "rope.scaling.original_context_length": None,
    "rope.scaling.finetuned": None,
}
_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# Where a key is missing, llama.cpp, which defines the format, takes this.
_DEFAULTS = {"rope.freq_base": 10000.0}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def read_config(
    metadata: Mapping[str, Any], names: Collection[str], rope_factors: NDArray[Any] | None
) -> LlamaConfig:
    """The config for a file's metadata, the names of its tensors, and its RoPE factors."""
    architecture = metadata["general.architecture"]
    own = {
        key.removeprefix(architecture + "."): _decimal(value)
        for key, value in metadata.items()
        if key.startswith(architecture + ".")
    }
    if unknown := sorted(set(own) - set(_KEYS)):
        raise ConfigError(
            f"unknown {', '.join(f'{architecture}.{key} = {own[key]!r}' for key in unknown)}, "
            f"which may change the maths"
        )
    own = _DEFAULTS | own
    if "vocab_size" not in own and "tokenizer.ggml.tokens" in metadata:
        own["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    if missing := [key for key in (*_REQUIRED, "vocab_size") if key not in own]:
        raise ConfigError(f"missing {', '.join(f'{architecture}.{key}' for key in missing)}")
    fields: dict[str, Any] = {
        field: own[key] for key, field in _KEYS.items() if field and key in own
    }
    fields |= {field: metadata.get(key) for field, key in _TOKENS.items()}
    config = LlamaConfig(
        **fields,
        rope_scaling=_scaling(own),
        attention_bias=architecture == "llama" and "blk.0.attn_q.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        tie_word_embeddings="output.weight" not in names,
        model_type=architecture,
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, config.head_dim) != config.head_dim:
            raise ConfigError(
                f"{architecture}.{key}: expected the head_dim, {config.head_dim}, got {own[key]!r}"
            )
    if rope_factors is None:
        return config
    return _with_llama3_scaling(config, rope_factors)


def _decimal(value: Any) -> Any:
    """The shortest decimal that rounds to a float32, which is how GGUF stores numbers.

    config.json says 1e-05, and the nearest float32 is 9.99999975e-06 in float64's eyes. Any
    decimal of up to 6 digits comes back from float32 as it was (FLT_DIG of the C standard), and
    the numbers of a config have fewer.
    """
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _scaling(own: Mapping[str, Any]) -> RopeScaling | None:
    kind = own.get("rope.scaling.type", "linear")  # llama.cpp's default, of factor 1
    factor: Any = own.get("rope.scaling.factor")
    context = own.get("rope.scaling.original_context_length")
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=factor)
    if kind == "yarn":
        return RopeScaling("yarn", factor=factor, original_max_position_embeddings=context)
    raise ConfigError(f"rope.scaling.type: expected none, linear or yarn, got {kind!r}")


def _with_llama3_scaling(config: LlamaConfig, factors: NDArray[Any]) -> LlamaConfig:
    """The config with the "llama3" scaling that a file's table of divisors stands for.

    llama.cpp keeps the divisors of the frequencies and drops the four numbers they came from. The
    largest divisor is the factor; the other three are the same in every published model (1, 4 and
    8192), and the table is recomputed from them, so a table of anything else is refused.
    """
    if config.rope_scaling is not None:
        raise ConfigError("rope.scaling: expected none beside rope_freqs.weight")
    if factors.shape != (config.head_dim // 2,) or not np.all(np.isfinite(factors) & (factors > 0)):
        raise ConfigError(
            f"rope_freqs.weight: expected {config.head_dim // 2} positive numbers, one for each "
            f"pair of channels"
        )
    scaling = RopeScaling(
        "llama3",
        factor=max(1.0, _decimal(float(factors[-1]))),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    scaled = replace(config, rope_scaling=scaling)
    # The table was computed in float32, with a cancellation that costs it two digits or so.
    if not np.allclose(factors, inv_freq(config) / inv_freq(scaled), rtol=1e-4, atol=0):
        raise ConfigError(
            "rope_freqs.weight: expected the factors of llama3 scaling with low_freq_factor 1, "
            "high_freq_factor 4 and original_max_position_embeddings 8192, got others"
        )
    return scaled
