"""The families of Gemma."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from llama_layers.config.checks import check_positive
from llama_layers.config.family import Family, Key, last_of_several_full


def _multiplier(scalar: Any) -> float:
    check_positive("query_pre_attn_scalar", scalar)
    return float(scalar**-0.5)


def _scalar(multiplier: float | None) -> float | None:
    """The number of which `_multiplier` makes this one: an integer, if there is one."""
    if multiplier is None:
        return None
    near = multiplier**-2
    around = [near, *(math.nextafter(near, end) for end in (0.0, math.inf))]
    return next((n for n in (round(near), *around) if n and n**-0.5 == multiplier), near)


_GELU = "gelu_pytorch_tanh"
_GEMMA = {
    "embedding_multiplier_rounded": True,
    "norm_weight_offset": 1.0,
    "hidden_act": _GELU,
}
_GEMMA_TOKENS: dict[str, Any] = {
    "head_dim": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
}
_CAUSAL = {"use_bidirectional_attention": False}
_GEMMA_2 = frozenset(
    """
    attention_bias sliding_window layer_types attention_multiplier attn_logit_softcapping
    final_logit_softcapping
    """.split()
)
_GEMMA_2_KEYS = {
    "hidden_act": Key("hidden_activation"),
    "attention_multiplier": Key("query_pre_attn_scalar", _multiplier, _scalar),
}
_GEMMA_2_IGNORES = frozenset({"sliding_window_pattern"})  # it is always every second layer
_GEMMA_NORMS = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}

GEMMA = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        reads=frozenset({"attention_bias"}),
        defaults=_GEMMA_TOKENS | {"num_key_value_heads": 16},
        built_in=_GEMMA,
        keys={"hidden_act": Key("hidden_act", lambda act: _GELU if act == "gelu" else act)},
        ignores=frozenset({"hidden_activation"}),
        needs=_CAUSAL,
        scales_embedding=True,
        rounds_before_weight=False,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        reads=_GEMMA_2,
        defaults=_GEMMA_TOKENS
        | {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        built_in=_GEMMA | {"norm_placement": "both"},
        keys=_GEMMA_2_KEYS,
        ignores=_GEMMA_2_IGNORES,
        needs=_CAUSAL,
        layer_types=partial(last_of_several_full, every=2),
        modules=_GEMMA_NORMS,
        scales_embedding=True,
        rounds_before_weight=False,
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        reads=_GEMMA_2 - {"attn_logit_softcapping"}  # which the class keeps and does not use
        | {"layer_rope_theta", "sliding_rope_scaling"},
        defaults=_GEMMA_TOKENS
        | {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,  # which a file may say
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        built_in=_GEMMA | {"norm_placement": "both", "qk_norm": "head"},
        keys=_GEMMA_2_KEYS,
        ignores=frozenset({"attn_logit_softcapping"}),
        layer_types=last_of_several_full,
        needs=_CAUSAL,
        modules=_GEMMA_NORMS,
        rope="type",
        scales_embedding=True,
        rounds_before_weight=False,
    ),
    "vaultgemma": Family(
        architecture="VaultGemmaForCausalLM",
        reads=_GEMMA_2,
        defaults=_GEMMA_TOKENS
        | {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        built_in=_GEMMA,
        keys=_GEMMA_2_KEYS,
        ignores=_GEMMA_2_IGNORES,
        layer_types=partial(last_of_several_full, every=2),
        modules={"post_attention_layernorm": "pre_feedforward_layernorm"},
        scales_embedding=True,
        rounds_before_weight=False,
    ),
}
