"""The model families: keys that transformers' class of a ``model_type`` reads, and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    qkv_bias : bool
        Whether queries, keys and values have biases whatever ``attention_bias`` says, and the
        output of attention has none.
    switches_window : bool
        Whether ``use_sliding_window`` and ``max_window_layers`` say which layers have the window.
    """

    architecture: str
    reads: frozenset[str]
    defaults: Mapping[str, Any]
    ignores: frozenset[str] = frozenset()
    built_in: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    switches_window: bool = False


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        reads=frozenset({"attention_bias", "mlp_bias"}),
        defaults={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        reads=frozenset({"sliding_window", "layer_types"}),
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        ignores=frozenset({"use_sliding_window"}),  # the window is always on
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        reads=frozenset({"sliding_window", "layer_types"}),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
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
}
# The switches of the block, with the values that Llama has.
SWITCHES: dict[str, Any] = {"qk_norm": "none", "qk_norm_weight": True, "qk_norm_after_rope": False}
_SOMETIMES_READ = frozenset(SWITCHES).union(*(family.reads for family in FAMILIES.values()))


def unread_fields(model_type: str) -> frozenset[str]:
    """The fields of `LlamaConfig` that transformers' class of a family does not read."""
    return _SOMETIMES_READ - FAMILIES[model_type].reads


def family_switches(model_type: str) -> dict[str, Any]:
    """The values that the switches of the block have in a family, if a config does not say."""
    return {**SWITCHES, **FAMILIES[model_type].built_in}
