"""Random checkpoints of transformers' own classes, one or more of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The family, and options of its config: each family with all of its switches at least once.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {}),
    "olmo2, biases": (
        "olmo2",
        {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    "exaone4": ("exaone4", {"num_hidden_layers": 4, "sliding_window": 7, "head_dim": 12}),
    "exaone4, every second": ("exaone4", {"sliding_window": 7, "sliding_window_pattern": 2}),
    "exaone4, no window": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "glm4": ("glm4", {"head_dim": 16}),
    "glm4, no biases": ("glm4", {"head_dim": 8, "attention_bias": False}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 8}),
    "hunyuan_v1_dense, biases": (
        "hunyuan_v1_dense",
        {
            "head_dim": 12,
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
    ),
    "ministral": (
        "ministral",
        {
            "head_dim": 8,
            "sliding_window": 7,
            "layer_types": ["full_attention", *["sliding_attention"] * 2],
        },
    ),
    "cwm": ("cwm", {"sliding_window": 7, "head_dim": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8, "tie_word_embeddings": False}),
    "ernie4_5, biases": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "exaone": ("exaone", {"attention_bias": True, "mlp_bias": True}),
    "helium": ("helium", {"head_dim": 8}),
    "helium, biases": ("helium", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "internlm3": ("internlm3", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("iquestcoder", {"head_dim": 16}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "seed_oss, other biases": (
        "seed_oss",
        {"head_dim": 8, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3, windows": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "ministral3, plain RoPE": (
        "ministral3",
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "ministral3, no temperature": (
        "ministral3",
        {
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0,
            },
        },
    ),
    "glm": ("glm", {"head_dim": 12}),  # of which 6 are rotated
    "glm, no biases": ("glm", {"head_dim": 8, "attention_bias": False}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3, longrope": (
        "phi3",
        {
            "num_attention_heads": 2,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 8.0],
            },
        },
    ),
    "granite_swa": (
        "granite_swa",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "sliding_window": 7,
            "layer_rope_theta": [10000.0, 0, 500.0],
            "tie_word_embeddings": False,
        },
    ),
    "granite_swa, defaults": ("granite_swa", {"sliding_window": 7, "attention_bias": True}),
    "granite, defaults": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "hyperclovax": (
        "hyperclovax",
        {
            "embedding_multiplier": 10.0,
            "attention_multiplier": 0.08,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.12,
            "head_dim": 8,
        },
    ),
    "hyperclovax, no post norm": ("hyperclovax", {"use_post_norm": False}),
    "gemma": ("gemma", {"head_dim": 10}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 10,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma2, no caps": (
        "gemma2",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 10,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 7,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "vaultgemma": (
        "vaultgemma",
        {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 7},
    ),
}


def written(directory: Path, family: str, options: dict[str, Any]) -> Path:
    """A checkpoint of random weights, of a size that makes attention sharp."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **BASE | options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and parameter.mean() > 0.5 else 0.0
        torch.nn.init.normal_(parameter, centre, 0.3)
    model.save_pretrained(directory)
    return directory


def opened(directory: Path, dtype: str = "float32") -> Any:
    """The model of a checkpoint in transformers, with attention whose parts can be replaced."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()
