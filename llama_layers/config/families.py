"""The model families: keys that transformers' class of a ``model_type`` reads, and defaults."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from llama_layers.config.checks import check_flag
from llama_layers.config.exaone import EXAONE_NAMES
from llama_layers.config.family import Family, Key, last_of_several_full
from llama_layers.config.gemma import GEMMA


def _placement(post_norm: Any) -> str:
    check_flag("use_post_norm", post_norm)
    return "both" if post_norm else "before"


def _first_of_four_full(layers: int) -> list[str]:
    """Types of layers of which each first of four attends to all tokens."""
    return ["sliding_attention" if layer % 4 else "full_attention" for layer in range(layers)]


_NORMS_OF_OLMO = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
_MISTRAL = Family(
    architecture="MistralForCausalLM",
    reads=frozenset({"sliding_window", "layer_types"}),
    defaults={
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    ignores=frozenset({"use_sliding_window"}),  # the window is always on
)

_MULTIPLIERS = frozenset(
    {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"}
)
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": _MISTRAL,
    "ministral": replace(_MISTRAL, architecture="MinistralForCausalLM"),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        reads=frozenset({"sliding_window", "layer_types"}),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
        output_bias=False,
        switches_window=True,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        reads=frozenset({"attention_bias", "sliding_window", "layer_types"}),
        defaults={
            "head_dim": 128,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        built_in={"qk_norm": "head"},
        switches_window=True,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias", "sliding_window", "layer_types"}),
        defaults={
            "num_key_value_heads": 4,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        rope="no_rope_layers",
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        reads=frozenset({"sliding_window", "llama_4_scaling_beta", "llama_4_scaling_context"}),
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 11,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "glm": Family(
        architecture="GlmForCausalLM",
        reads=frozenset({"attention_bias", "partial_rotary_factor"}),
        defaults={
            "attention_bias": True,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "num_key_value_heads": 2,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
        },
        output_bias=False,
        fused=frozenset({"mlp.gate_up_proj"}),
        interleaved=True,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        reads=frozenset({"sliding_window", "partial_rotary_factor"}),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
            "original_max_position_embeddings": 4096,
        },
        scaling_names={"su": "longrope", "yarn": "longrope"},
        fused=frozenset({"self_attn.qkv_proj", "mlp.gate_up_proj"}),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        rounds_before_weight=False,
        reads=frozenset({"attention_bias"}),
        defaults={"eos_token_id": 50279, "pad_token_id": 1},
        built_in={"norm_placement": "after", "qk_norm": "full"},
        modules=_NORMS_OF_OLMO,
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        rounds_before_weight=False,
        reads=frozenset({"attention_bias", "sliding_window", "layer_types"}),
        defaults={
            "eos_token_id": 50279,
            "pad_token_id": 1,
            "rope_theta": 500000.0,
            "sliding_window": 4096,
        },
        built_in={"norm_placement": "after", "qk_norm": "full"},
        modules=_NORMS_OF_OLMO,
        rope="type",
        layer_types=partial(last_of_several_full, every=4),
    ),
    "exaone4": Family(
        architecture="Exaone4ForCausalLM",
        reads=frozenset({"sliding_window", "layer_types"}),
        defaults={
            "bos_token_id": 0,
            "eos_token_id": 2,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,  # which a file may say
        },
        built_in={"norm_placement": "after", "qk_norm": "head"},
        modules=_NORMS_OF_OLMO,
        rope="windows",
        layer_types=last_of_several_full,
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        reads=frozenset({"attention_bias", "partial_rotary_factor"}),
        defaults={
            "attention_bias": True,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "num_key_value_heads": 2,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
        },
        built_in={"norm_placement": "both"},
        output_bias=False,
        fused=frozenset({"mlp.gate_up_proj"}),
        interleaved=True,
    ),
    "hunyuan_v1_dense": Family(
        architecture="HunYuanDenseV1ForCausalLM",
        reads=frozenset({"attention_bias"}),
        defaults={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        built_in={"qk_norm": "head", "qk_norm_after_rope": True},
        modules={
            "self_attn.q_norm": "self_attn.query_layernorm",
            "self_attn.k_norm": "self_attn.key_layernorm",
        },
        ntk_alpha=True,
    ),
    "cwm": Family(
        architecture="CwmForCausalLM",
        reads=frozenset({"mlp_bias", "sliding_window", "layer_types"}),
        defaults={
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 128,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "llama3",
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "rope_theta": 1e6,
            "sliding_window": 8192,
        },
        ignores=frozenset({"use_sliding_window"}),
        layer_types=_first_of_four_full,
    ),
    "ernie4_5": Family(
        architecture="Ernie4_5ForCausalLM",
        reads=frozenset(),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        interleaved=True,
        other_keys={"use_bias": ("attention_bias", "mlp_bias")},
    ),
    "exaone": Family(
        architecture="ExaoneForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 361,
            "num_key_value_heads": 8,
            "pad_token_id": 0,
            "rope_theta": 500000.0,
        },
        other_keys={
            "num_layers": ("num_hidden_layers",),
            "layer_norm_epsilon": ("rms_norm_eps",),
            "activation_function": ("hidden_act",),
        },
        stored_names=EXAONE_NAMES,
    ),
    "helium": Family(
        architecture="HeliumForCausalLM",
        rounds_before_weight=False,
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "num_key_value_heads": 20,
            "pad_token_id": 3,
            "rope_theta": 100000.0,
        },
        output_bias=False,
        interleaved=True,
    ),
    "internlm3": Family(
        architecture="InternLM3ForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "pad_token_id": 2,
        },
        other_keys={"qkv_bias": ("attention_bias",), "bias": ("mlp_bias", "attention_out_bias")},
    ),
    "iquestcoder": Family(
        architecture="IQuestCoderForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "num_key_value_heads": 8,
        },
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        reads=frozenset({"attention_bias", "attention_out_bias", "mlp_bias"}),
        defaults={
            "attention_bias": True,
            "attention_out_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "pad_token_id": 1,
        },
        output_bias=False,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}) | _MULTIPLIERS,
        defaults={"bos_token_id": 1, "eos_token_id": 2, "attention_multiplier": 1.0},
        multiplies_inputs=True,
    ),
    "granite_swa": Family(
        architecture="GraniteSWAForCausalLM",
        reads=frozenset(
            {"attention_bias", "mlp_bias", "sliding_window", "layer_types", "layer_rope_theta"}
        )
        | _MULTIPLIERS,
        defaults={
            "bos_token_id": 100257,
            "eos_token_id": 100257,
            "num_key_value_heads": 4,
            "sliding_window": 128,
            "tie_word_embeddings": True,
            "attention_multiplier": 1.0,
        },
        built_in={"attention_sinks": True},
        layer_types=_first_of_four_full,
        multiplies_inputs=True,
        rope="layer",
    ),
    "hyperclovax": Family(
        architecture="HyperCLOVAXForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias", "norm_placement"}) | _MULTIPLIERS,
        defaults={"bos_token_id": 1, "eos_token_id": 2, "use_post_norm": True},
        built_in={"norm_placement": "both"},
        keys={"norm_placement": Key("use_post_norm", _placement, lambda where: where == "both")},
        modules={"post_self_attn_layernorm": "post_norm1", "post_mlp_layernorm": "post_norm2"},
        multiplies_inputs=True,
        multiplies_logits=True,
    ),
    **GEMMA,
}
# The switches of the block, with the values that Llama has.
SWITCHES: dict[str, Any] = {
    "attention_sinks": False,
    "norm_placement": "before",
    "qk_norm": "none",
    "qk_norm_weight": True,
    "qk_norm_after_rope": False,
    "embedding_multiplier": 1.0,
    "embedding_multiplier_rounded": False,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "norm_weight_offset": 0.0,
    "hidden_act": "silu",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "layer_rope_theta": None,
    "sliding_rope_scaling": True,
    "partial_rotary_factor": 1.0,
    "llama_4_scaling_beta": 0.0,
}
_SOMETIMES_READ = (frozenset(SWITCHES) - {"hidden_act"}).union(
    *(family.reads for family in FAMILIES.values())
)


def unread_fields(model_type: str) -> frozenset[str]:
    """The fields of `LlamaConfig` that transformers' class of a family does not read."""
    return _SOMETIMES_READ - FAMILIES[model_type].reads


def family_switches(model_type: str, hidden_size: int) -> dict[str, Any]:
    """The values that the switches of the block have in a family, if a config does not say."""
    family = FAMILIES[model_type]
    root = {"embedding_multiplier": math.sqrt(hidden_size)} if family.scales_embedding else {}
    return {**SWITCHES, **family.built_in, **root}


def module_name(model_type: str, role: str) -> str:
    """What transformers' class of a family calls a module inside a layer."""
    return FAMILIES[model_type].modules.get(role, role)


def names_norms_otherwise(model_type: str) -> bool:
    """Whether a family has the name of one norm here for another."""
    modules = FAMILIES[model_type].modules
    return "post_attention_layernorm" in modules.values()


def is_renamed(model_type: str, role: str) -> bool:
    """Whether a family has the name of a module that it does not have for another one."""
    modules = FAMILIES[model_type].modules
    return role not in modules and role in modules.values()


def tensor_name(model_type: str, name: str) -> str:
    """What files of a family call a tensor inside a layer: its module's name, ``.weight``."""
    module, _, kind = name.rpartition(".")
    return f"{module_name(model_type, module)}.{kind}"
