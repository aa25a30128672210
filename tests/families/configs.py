"""A tiny config of each family, with its switches on.

Layer 1 has RoPE in each, since most mistakes are made there.
"""

from __future__ import annotations

from typing import Any

from llama_layers import LlamaConfig

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}
_GEMMA = {"sliding_window": 7, "query_pre_attn_scalar": 7, "layer_types": _MIXED}
_CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 7},
    "ministral": {"sliding_window": 7, "layer_types": _MIXED},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 2000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.3,
        }
    },
    "glm": {},
    "phi3": {
        "sliding_window": 7,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 2000.0,
            "short_factor": [1.0, 1.5],
            "long_factor": [1.25, 6.0],
        },
    },
    "olmo2": {"attention_bias": True},
    "olmo3": {
        "sliding_window": 7,
        "layer_types": _MIXED,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 2000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "exaone4": {
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "glm4": {},
    "hunyuan_v1_dense": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 100.0,
            "factor": 1.0,
            "alpha": 50.0,
            "beta_fast": 32,
            "mscale": 1.0,
        },
    },
    "cwm": {
        "sliding_window": 7,
        "layer_types": _MIXED,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 2000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "ernie4_5": {"use_bias": True},
    "exaone": _BIASES,
    "helium": _BIASES,
    "internlm3": {"qkv_bias": True, "bias": True},
    "iquestcoder": _BIASES,
    "seed_oss": {"attention_out_bias": True, "mlp_bias": True},
    "granite": _MULTIPLIERS | _BIASES,
    "granite_swa": _MULTIPLIERS
    | {
        "sliding_window": 7,
        "layer_types": _MIXED,
        "layer_rope_theta": [500.0, 2000.0, 0],
    },
    "hyperclovax": _MULTIPLIERS | {"logits_scaling": 0.12},
    "gemma": {},
    "gemma2": _GEMMA | _CAPS,
    "gemma3_text": _GEMMA
    | {
        "final_logit_softcapping": 4.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    },
    "vaultgemma": _GEMMA | _CAPS,
}


def _theta(options: dict[str, Any]) -> dict[str, float]:
    """A theta for a prompt of a few tokens, if the options have none."""
    return {} if "rope_parameters" in options else {"rope_theta": 2000.0}


CONFIGS = {
    family: LlamaConfig.from_json({"model_type": family, **_SIZES, **_theta(options), **options})
    for family, options in _OPTIONS.items()
}
# Those whose classes rotate channels next to each other.
INTERLEAVED = frozenset({"glm", "glm4", "ernie4_5", "helium"})
