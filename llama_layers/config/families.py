"""The model families: keys that transformers' class of a ``model_type`` reads, and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """The things that tell a family from the others.

    Attributes
    ----------
    architecture : str
        The name of the class.
    reads : frozenset of str
        The fields of `LlamaConfig` that this family reads and another does not.
    defaults : Mapping of str to Any
        Values of keys that a file leaves out; null is another matter.
    ignores : frozenset of str
        Keys that change the maths in another family and nothing in this one.
    built_in : Mapping of str to Any
        Values of switches in the code of the class, where they are not Llama's.
    keys : Mapping of str to str
        Keys of a file that are not called as the field of `LlamaConfig`, by the field.
    modules : Mapping of str to str
        What transformers' class calls modules inside a layer that have another name here. The
        names here are Llama's, and GLM-4's for norms that Llama does not have: ``input_layernorm``
        and ``post_attention_layernorm`` come before attention and before the MLP,
        ``post_self_attn_layernorm`` and ``post_mlp_layernorm`` after them.
    qkv_bias : bool
        Whether queries, keys and values have biases whatever ``attention_bias`` says.
    output_bias : bool
        Whether ``attention_bias`` gives a bias to the output of attention, too.
    switches_window : bool
        Whether ``use_sliding_window`` and ``max_window_layers`` say which layers have the window.
    rope : {"same", "no_rope_layers", "windows", "type", "layer"}
        How a file says which layers have RoPE, and which: alike in all; by ``no_rope_layers``; only
        those with a window; by parameters for each type of layer; by ``layer_rope_theta``.
    scaling_names : Mapping of str to str
        Other names that its files have for kinds of scaling.
    fused : frozenset of str
        Modules of a layer that its files have instead of several, whose rows they hold.
    interleaved : bool
        Whether the class rotates channels next to each other, so that its files have the rows of
        queries and keys in that order.
    other_keys : Mapping of str to tuple of str
        Other names that its files have for keys, each with the fields that it sets.
    stored_names : Mapping of str to str
        Names of modules in its files, where they are others than in the class: by the name in the
        class, with {} for the number of a layer.
    layer_types : callable or None
        The ``layer_types`` of a number of layers, where a file does not say.
    multiplies_inputs : bool
        Whether ``embedding_multiplier`` multiplies vectors that come instead of ids, too.
    multiplies_logits : bool
        Whether ``logits_scaling`` multiplies the logits; it divides them elsewhere.
    """

    architecture: str
    reads: frozenset[str]
    defaults: Mapping[str, Any]
    ignores: frozenset[str] = frozenset()
    built_in: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: bool = False
    output_bias: bool = True
    switches_window: bool = False
    rope: str = "same"
    scaling_names: Mapping[str, str] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    interleaved: bool = False
    other_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stored_names: Mapping[str, str] = field(default_factory=dict)
    layer_types: Callable[[int], list[str]] | None = None
    multiplies_inputs: bool = False
    multiplies_logits: bool = False


def _first_of_four_full(layers: int) -> list[str]:
    """Types of layers of which each first of four attends to all tokens."""
    return ["sliding_attention" if layer % 4 else "full_attention" for layer in range(layers)]


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
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        reads=frozenset({"attention_bias"}),
        defaults={"eos_token_id": 50279, "pad_token_id": 1},
        built_in={"norm_placement": "after", "qk_norm": "full"},
        modules={
            "post_self_attn_layernorm": "post_attention_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
        },
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
        stored_names={
            "model.embed_tokens": "transformer.wte",
            "model.layers.{}.input_layernorm": "transformer.h.{}.ln_1",
            "model.layers.{}.self_attn.q_proj": "transformer.h.{}.attn.attention.q_proj",
            "model.layers.{}.self_attn.k_proj": "transformer.h.{}.attn.attention.k_proj",
            "model.layers.{}.self_attn.v_proj": "transformer.h.{}.attn.attention.v_proj",
            "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.attention.out_proj",
            "model.layers.{}.post_attention_layernorm": "transformer.h.{}.ln_2",
            "model.layers.{}.mlp.gate_proj": "transformer.h.{}.mlp.c_fc_0",
            "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc_1",
            "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.c_proj",
            "model.norm": "transformer.ln_f",
        },
    ),
    "helium": Family(
        architecture="HeliumForCausalLM",
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
    "layer_rope_theta": None,
    "sliding_rope_scaling": True,
    "partial_rotary_factor": 1.0,
    "llama_4_scaling_beta": 0.0,
}
_SOMETIMES_READ = frozenset(SWITCHES).union(*(family.reads for family in FAMILIES.values()))


def unread_fields(model_type: str) -> frozenset[str]:
    """The fields of `LlamaConfig` that transformers' class of a family does not read."""
    return _SOMETIMES_READ - FAMILIES[model_type].reads


def family_switches(model_type: str) -> dict[str, Any]:
    """The values that the switches of the block have in a family, if a config does not say."""
    return {**SWITCHES, **FAMILIES[model_type].built_in}


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
