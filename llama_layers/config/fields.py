"""The fields of a config, with their types, defaults and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.config.checks import (
    Count,
    Flag,
    HeadDim,
    LayerCount,
    Positive,
    TokenId,
    TokenIds,
    check_count,
    check_fields,
    check_layer_count,
    check_name,
    check_not_negative,
    check_share,
    check_thetas,
)
from llama_layers.config.families import FAMILIES, family_switches, names_norms_otherwise
from llama_layers.config.rope_layers import RopeOfLayers, check_rope, ropes_of
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.errors import ConfigError, shown

# The default of a field that follows from other fields.
_DERIVED: Any = None


def _check_scaling(name: str, value: object) -> None:
    if not isinstance(value, RopeScaling):
        raise ConfigError(
            f"{name}: expected a RopeScaling, a mapping or None, got {type(value).__name__}"
        )


def _check_layer_types(name: str, value: object) -> None:
    if not isinstance(value, tuple):
        raise ConfigError(f"{name}: expected a list, got {shown(value)}")
    for kind in value:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"{name}: expected 'full_attention' or 'sliding_attention', got {shown(kind)}"
            )


def _check_offset(name: str, value: object) -> None:
    if isinstance(value, bool) or value not in (0, 1):
        raise ConfigError(f"{name}: expected 0 or 1, got {shown(value)}")


@dataclass(frozen=True)
class Fields(RopeOfLayers):
    """The fields, which `LlamaConfig` documents."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: LayerCount
    num_attention_heads: Count
    rms_norm_eps: Positive
    rope_theta: Positive
    max_position_embeddings: Count
    num_key_value_heads: Count = _DERIVED
    head_dim: HeadDim = _DERIVED
    rope_scaling: Annotated[RopeScaling, _check_scaling] | None = None
    layer_rope_theta: Annotated[tuple[float, ...], check_thetas] | None = None
    sliding_rope_scaling: Flag = True
    partial_rotary_factor: Annotated[float, check_share] = 1.0
    llama_4_scaling_beta: Annotated[float, check_not_negative] = 0.0
    llama_4_scaling_context: Count | None = None
    sliding_window: Count | None = None
    layer_types: Annotated[tuple[str, ...], _check_layer_types] | None = None
    attention_bias: Flag = False
    mlp_bias: Flag = False
    tie_word_embeddings: Flag = False
    hidden_act: Annotated[str, partial(check_name, known=("silu", "gelu_pytorch_tanh"))] = _DERIVED
    model_type: Annotated[str, partial(check_name, known=FAMILIES)] = "llama"
    norm_placement: Annotated[str, partial(check_name, known=("before", "after", "both"))] = (
        _DERIVED
    )
    qk_norm: Annotated[str, partial(check_name, known=("none", "head", "full"))] = _DERIVED
    qk_norm_weight: Flag = _DERIVED
    qk_norm_after_rope: Flag = _DERIVED
    attention_out_bias: Flag | None = None
    attention_sinks: Flag = _DERIVED
    embedding_multiplier: Positive = _DERIVED
    embedding_multiplier_rounded: Flag = _DERIVED
    attention_multiplier: Positive | None = None
    residual_multiplier: Positive = _DERIVED
    logits_scaling: Positive = _DERIVED
    norm_weight_offset: Annotated[float, _check_offset] = _DERIVED
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    dtype: Annotated[str, partial(check_name, known=FLOATS)] | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenIds | None = None
    pad_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        self._derive()
        check_fields(self)
        self._check_together()
        self._set(ropes_of(self))

    def _check_together(self) -> None:
        """Raise ConfigError if fields that are right by themselves cannot go together."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: expected a divisor of num_attention_heads = "
                f"{self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if self.qk_norm == "none" and (self.qk_norm_after_rope or not self.qk_norm_weight):
            raise ConfigError(
                "qk_norm: expected 'head' or 'full', since qk_norm_after_rope or qk_norm_weight "
                "says how, got 'none'"
            )
        usual = family_switches(self.model_type, self.hidden_size)["norm_placement"]
        if self.norm_placement != usual and names_norms_otherwise(self.model_type):
            raise ConfigError(
                f"norm_placement: expected {usual!r}, which the names of the norms in a "
                f"{self.model_type} stand for, got {self.norm_placement!r}"
            )
        for name, key in FAMILIES[self.model_type].keys.items():
            value = getattr(self, name)
            if value is not None and key.read(key.write(value)) != value:
                raise ConfigError(
                    f"{name}: expected a value that {key.name} has in a file of {self.model_type}, "
                    f"got {shown(value)}"
                )
        check_rope(self)
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ConfigError(
                    f"layer_types: expected {self.num_hidden_layers} entries, one for each layer, "
                    f"got {len(self.layer_types)}"
                )
            if "sliding_attention" in self.layer_types and self.sliding_window is None:
                raise ConfigError("sliding_window: missing, and layer_types asks for it")

    def _derive(self) -> None:
        """Fill in what follows from other fields, and give lists and mappings their types."""
        derived: dict[str, Any] = {
            name: tuple(value)
            for name in ("layer_types", "eos_token_id", "layer_rope_theta")
            if isinstance(value := getattr(self, name), list)
        }
        if isinstance(self.rope_scaling, Mapping):
            derived["rope_scaling"] = RopeScaling.from_mapping(self.rope_scaling)
        if self.llama_4_scaling_context == self.max_position_embeddings:
            derived["llama_4_scaling_context"] = None
        check_name("model_type", self.model_type, FAMILIES)
        check_count("hidden_size", self.hidden_size)
        for name, value in family_switches(self.model_type, self.hidden_size).items():
            if getattr(self, name) is None:
                derived[name] = value
        if self.layer_types is None and FAMILIES[self.model_type].layer_types is not None:
            # A file without them means others.
            check_layer_count("num_hidden_layers", self.num_hidden_layers)
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            derived["layer_types"] = (kind,) * self.num_hidden_layers
        if self.num_key_value_heads is None:
            derived["num_key_value_heads"] = self.num_attention_heads
        if self.head_dim is None:
            check_count("num_attention_heads", self.num_attention_heads)
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size: expected a multiple of num_attention_heads = "
                    f"{self.num_attention_heads} where head_dim is not given, "
                    f"got {self.hidden_size}"
                )
            derived["head_dim"] = self.hidden_size // self.num_attention_heads
        self._set(derived)

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # since the dataclass is frozen
