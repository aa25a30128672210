"""From a GGUF file's metadata to a config.

llama.cpp, which defines the format, is the reference: for the keys that it reads of these
architectures, for what it takes where one is missing, and for what the values mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import log
from typing import Any, NamedTuple

import numpy as np

from llama_layers.checkpoint.gguf.metadata import GGUFStrings, Section, shown
from llama_layers.checkpoint.gguf.unread_keys import unread_keys
from llama_layers.checkpoint.tokenizer.vocabulary import ends_by_spelling
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.errors import ConfigError
from llama_layers.layers.rope import inv_freq

# Mistral's files say llama. llama.cpp's own converter permutes Q and K for llama only.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

_EPS = "attention.layer_norm_rms_epsilon"
_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Keys without the architecture in front, and the config's field.
_COUNTS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_REQUIRED = (*list(_COUNTS)[:5], _EPS)
_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


class GGUFConfig(NamedTuple):
    """A config, the tokens at which a text ends, and keys that went into no number."""

    config: LlamaConfig
    ends: tuple[int, ...]
    ignored_keys: tuple[str, ...]


def read_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: np.ndarray | None,
) -> GGUFConfig:
    """Read the config of one of the `ARCHITECTURES`.

    `shapes` are those of the tensors, by their names in the file. `rope_factors` divide the RoPE
    frequencies, where the file has them.
    """
    architecture = metadata["general.architecture"]
    own = Section(metadata, f"{architecture}.", ConfigError)
    tokenizer = Section(metadata, "tokenizer.ggml.", ConfigError)
    own.expect(*_REQUIRED)
    layers = own.integer("block_count")
    rows, *_ = shapes.get("token_embd.weight") or (0,)
    vocab_size = _vocab_size(own, tokenizer, rows)
    fields: dict[str, Any] = {
        field: _of_all_layers(own, key, layers) for key, field in _COUNTS.items() if key in own
    }
    fields |= {field: _token_id(tokenizer, name, vocab_size) for field, name in _IDS.items()}
    config = LlamaConfig(
        **fields,
        vocab_size=vocab_size,
        rms_norm_eps=_decimal(own.number(_EPS)),
        rope_theta=_decimal(own.number("rope.freq_base", 10000.0)),
        rope_scaling=_scaling(own),
        attention_bias=architecture != "qwen2" and "blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        tie_word_embeddings="output.weight" not in shapes,
        model_type=architecture,
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := own.integer(key, config.head_dim)) != config.head_dim:
            raise own.error(key, f"expected the head_dim, {config.head_dim}, got {size}")
    ignored = unread_keys(own.unread(), metadata, config)
    if rope_factors is not None:
        config = _with_llama3_scaling(config, rope_factors)
    return GGUFConfig(config, _ends(tokenizer, vocab_size), ignored)


def _of_all_layers(own: Section, key: str, layers: int) -> int:
    """Read an integer, which may be there once for each layer."""
    value = own.get(key)
    if not isinstance(value, np.ndarray):
        return own.integer(key)
    if value.dtype.kind in "iu" and 0 < value.size == layers and np.all(value == value[0]):
        return int(value[0])
    raise own.error(
        key,
        f"expected an integer, or the same one for each of the {layers} layers, got {shown(value)}",
    )


def _vocab_size(own: Section, tokenizer: Section, rows: int) -> int:
    """The number of tokens: that of the embedding's rows, if it is that of the vocabulary."""
    tokens = tokenizer.strings("tokens") if "tokens" in tokenizer else ()
    if not tokens:
        own.expect("vocab_size")
    stated = own.integer("vocab_size", len(tokens))
    return rows if rows == len(tokens) else stated


def _token_id(tokenizer: Section, name: str, vocab_size: int) -> int | None:
    """The id of a special token; None if the vocabulary does not have it, as for -1."""
    token = tokenizer.integer(f"{name}_token_id", -1)
    return token if 0 <= token < vocab_size else None


def _ends(tokenizer: Section, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text, a turn, a message or a file, at all of which llama.cpp stops.

    Ollama's converter writes a list of more. Many files name few of them by keys, so llama.cpp
    knows the rest by their spelling.
    """
    ends = [_token_id(tokenizer, name, vocab_size) for name in _ENDS]
    more = tokenizer.get("eos_token_ids", np.zeros(0, np.int32))
    if not isinstance(more, np.ndarray) or more.dtype.kind not in "iu":
        raise tokenizer.error("eos_token_ids", f"expected an array of integers, got {shown(more)}")
    tokens = tokenizer.get("tokens")
    spelled = ends_by_spelling(tokens) if isinstance(tokens, GGUFStrings) else []
    known = (end for end in [*ends, *more.tolist(), *spelled] if end is not None)
    return tuple(dict.fromkeys(end for end in known if 0 <= end < vocab_size))


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to a float32, which is how GGUF stores numbers.

    config.json says 1e-05, and the nearest float32 is 9.99999975e-06 as a float64. Any
    decimal of up to 6 digits comes back from float32 as it was (FLT_DIG of the C standard), and
    the numbers of a config have fewer.
    """
    with np.errstate(over="ignore"):
        narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


def _scaling(own: Section) -> RopeScaling | None:
    """The scaling of RoPE, without what a tensor of divisors may add."""
    kind = own.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"rope.scaling.type: expected none, linear or yarn, got {kind!r}")
    factor = _decimal(own.number("rope.scaling.factor", own.number("rope.scale_linear"))) or 1.0
    attention_factor = _decimal(own.number("rope.scaling.attn_factor", 1.0))
    if kind == "yarn" and factor != 1.0:
        return _yarn(own, factor, attention_factor)
    if attention_factor != 1.0:
        raise ConfigError(
            f"rope.scaling.attn_factor: expected 1.0 without yarn, got {attention_factor!r}"
        )
    return None if kind == "none" or factor == 1.0 else RopeScaling("linear", factor=factor)


def _yarn(own: Section, factor: float, attention_factor: float) -> RopeScaling:
    """The scaling of type yarn, in which llama.cpp's attention factor multiplies the usual one."""
    for name, neutral in (("yarn_attn_factor", (1.0,)), ("yarn_ext_factor", (1.0, -1.0))):
        if (value := own.number(f"rope.scaling.{name}", 1.0)) not in neutral:
            raise ConfigError(f"rope.scaling.{name}: expected 1.0, got {value!r}")
    betas: dict[str, Any] = {
        name: _decimal(own.number(f"rope.scaling.yarn_{name}"))
        for name in ("beta_fast", "beta_slow")
        if f"rope.scaling.yarn_{name}" in own
    }
    usual = 0.1 * log(factor) + 1 if factor > 1 else 1.0
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position_embeddings=own.integer("rope.scaling.original_context_length")
        or None,
        attention_factor=None if attention_factor == 1.0 else attention_factor * usual,
        **betas,
    )


def _with_llama3_scaling(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
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
