"""From a GGUF file's metadata to a config.

llama.cpp, which defines the format, is the reference: for the keys that it reads of these
architectures, for what it takes where one is missing, and for what the values mean. A key that it
ignores counts where transformers reads what it was converted from, as the window of Phi-3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from llama_layers.checkpoint.gguf.gemma import gemma_fields
from llama_layers.checkpoint.gguf.metadata import GGUFStrings, Section, shown
from llama_layers.checkpoint.gguf.of_layers import fields_of_layers, model_type_of
from llama_layers.checkpoint.gguf.rope import (
    LLAMA3,
    PARTIAL,
    decimal,
    rope_fields,
    with_llama3_scaling,
)
from llama_layers.checkpoint.gguf.unread_keys import unread_keys
from llama_layers.checkpoint.tokenizer.vocabulary import ends_by_spelling
from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import ConfigError

# Mistral's files say llama.
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "granite", "ernie4_5", "exaone", "seed_oss"),
    *("smollm3", "mistral3", "phi3", "gemma", "gemma2", "gemma3"),
    *("olmo2", "exaone4", "chatglm", "glm4", "hunyuan-dense", "granite_swa"),
)
# Those in which llama.cpp rotates channels next to each other.
PERMUTED = frozenset(
    {"llama", "granite", "granite_swa", "ernie4_5", "chatglm", "glm4", "smollm3", "mistral3"}
)

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
# Numbers of some architectures, and the config's field; 0 stands for none.
_OF_GRANITE = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_SCALARS = {"granite": _OF_GRANITE, "granite_swa": _OF_GRANITE}
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
    divisors: Mapping[str, np.ndarray],
) -> GGUFConfig:
    """Read the config of one of the `ARCHITECTURES`.

    `shapes` are those of the tensors, by their names in the file. `divisors` are tensors that
    divide the RoPE frequencies, where the file has them.
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
    scalars = _SCALARS.get(architecture, {})
    fields |= {field: decimal(n) for key, field in scalars.items() if (n := own.number(key))}
    model_type = model_type_of(architecture, own)
    fields |= _attention_biases(model_type, shapes)
    fields |= rope_fields(architecture, own, divisors, fields)
    fields |= fields_of_layers(model_type, own, fields)
    if architecture.startswith("gemma"):
        fields |= gemma_fields(architecture, own, layers)
    config = LlamaConfig(
        **fields,
        vocab_size=vocab_size,
        rms_norm_eps=decimal(own.number(_EPS)),
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        tie_word_embeddings="output.weight" not in shapes,
        model_type=model_type,
    )
    rotated = config.head_dim if architecture not in PARTIAL else config.rotary_dim
    for key, width in (
        ("attention.value_length", config.head_dim),
        ("attention.key_length_swa", config.head_dim),
        ("attention.value_length_swa", config.head_dim),
        ("rope.dimension_count", rotated),
        ("rope.dimension_count_swa", rotated),
    ):
        if (size := own.integer(key, width)) != width:
            raise own.error(key, f"expected the head_dim, {width}, got {size}")
    ignored = unread_keys(own.unread(), metadata, config)
    if (factors := divisors.get(LLAMA3)) is not None:
        config = with_llama3_scaling(config, factors)
    return GGUFConfig(config, _ends(tokenizer, vocab_size), ignored)


def _attention_biases(model_type: str, shapes: Collection[str]) -> dict[str, bool]:
    """The fields that say which projections of attention have biases, as the tensors do."""
    family = FAMILIES[model_type]
    biased = "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes
    fields = {"attention_bias": biased and not family.qkv_bias}
    output = "blk.0.attn_output.bias" in shapes
    if output != (fields["attention_bias"] and family.output_bias):
        fields["attention_out_bias"] = output
    return fields


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
