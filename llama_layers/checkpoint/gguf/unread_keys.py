"""Keys of a GGUF file that have no field in a config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isclose
from typing import Any

import numpy as np

from llama_layers.checkpoint.gguf.metadata import shown
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import ConfigError

# Keys that llama.cpp reads for other architectures, and that change their maths unless they are
# 0 or false. In a file of ours, another value means that the file is not what it says it is.
_ZERO = frozenset(
    """
    activation_sparsity_scale attention.clamp_kqv attention.max_alibi_bias
    attention.shared_kv_layers attention.temperature_length attention.temperature_scale
    attn_logit_softcapping expert_count expert_used_count final_logit_softcapping
    n_deepstack_layers nextn_predict_layers norm_before_residual rescale_every_n_layers
    rope.dimension_sections rope.scaling.yarn_log_multiplier router_logit_softcapping
    swiglu_clamp_exp swiglu_clamp_shexp swin_norm use_parallel_residual
    """.split()
)
# Likewise unless they are 1, or 0, which stands for no factor.
_FACTORS = frozenset(
    """
    attention.output_scale attention.value_scale embedding_scale full_attention_interval
    logit_scale residual_scale rope.scaling.alpha
    """.split()
)


def unread_keys(
    keys: Iterable[str], metadata: Mapping[str, Any], config: LlamaConfig
) -> tuple[str, ...]:
    """The keys, among those not read for the config, that change no number whatever their value.

    Raises ConfigError if one of the others changes the maths by its value.
    """
    ignored = []
    for key in keys:
        neutral = _neutral(key.partition(".")[2], config)
        value = metadata[key] if neutral else None
        if not neutral:
            ignored.append(key)
        elif not any(_is(value, each) for each in neutral):
            raise ConfigError(
                f"{key}: expected {neutral[0]!r} or nothing, got {shown(value)}, which changes "
                f"the maths in a way that is not implemented"
            )
    return tuple(ignored)


def _neutral(key: str, config: LlamaConfig) -> tuple[object, ...]:
    """The values of a key that change no number; nothing if all do not."""
    if key in _ZERO:
        return (0,)
    if key in _FACTORS:
        return (1.0, 0.0)
    if key == "attention.causal":
        return (True,)
    if key == "hidden_activation":
        return ("silu",)
    if key == "attention.sliding_window":
        return (0, range(config.max_position_embeddings, 2**64))
    if key == "attention.scale":
        return (config.head_dim**-0.5, 0.0)
    return ()


def _is(value: object, neutral: object) -> bool:
    if isinstance(value, np.ndarray):
        return all(_is(each, neutral) for each in np.unique(value).tolist())
    if isinstance(value, float):
        return isinstance(neutral, float | int) and isclose(value, neutral, rel_tol=1e-6)
    if isinstance(neutral, range):
        return isinstance(value, int) and value in neutral
    return bool(value == neutral)
