"""The tensors of a layer: what files call them, their shapes, and the arrays that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from llama_layers.config.families import tensor_name
from llama_layers.config.llama_config import LlamaConfig

Names = tuple[str, ...]


class Tensor(NamedTuple):
    """A tensor of a checkpoint that is part of a layer."""

    name: str
    """Its name in Hugging Face's model, below the layer, where the family has no other for it."""
    axes: str
    """The size of each axis, by the names that `axis_sizes` gives them."""
    path: str
    """The attribute of `LayerWeights` that holds it. One array holds all tensors of the same path,
    their rows below each other."""
    switch: str | None = None
    """The attribute of `LlamaConfig` that says whether it exists; None if it always does."""


# In the order in which files hold them.
TENSORS = (
    Tensor("input_layernorm.weight", "hidden_size", "input_layernorm", "norms_before"),
    Tensor("self_attn.q_proj.weight", "q_size hidden_size", "self_attn.qkv.fused"),
    Tensor("self_attn.k_proj.weight", "kv_size hidden_size", "self_attn.qkv.fused"),
    Tensor("self_attn.v_proj.weight", "kv_size hidden_size", "self_attn.qkv.fused"),
    Tensor("self_attn.q_proj.bias", "q_size", "self_attn.qkv.bias", "qkv_bias"),
    Tensor("self_attn.k_proj.bias", "kv_size", "self_attn.qkv.bias", "qkv_bias"),
    Tensor("self_attn.v_proj.bias", "kv_size", "self_attn.qkv.bias", "qkv_bias"),
    Tensor("self_attn.q_norm.weight", "q_norm_size", "self_attn.q_norm", "qk_norm_weights"),
    Tensor("self_attn.k_norm.weight", "k_norm_size", "self_attn.k_norm", "qk_norm_weights"),
    Tensor("self_attn.sinks", "num_heads", "self_attn.sinks", "attention_sinks"),
    Tensor("self_attn.o_proj.weight", "hidden_size q_size", "self_attn.o_proj"),
    Tensor("self_attn.o_proj.bias", "hidden_size", "self_attn.o_bias", "o_bias"),
    Tensor(
        "post_self_attn_layernorm.weight", "hidden_size", "post_self_attn_layernorm", "norms_after"
    ),
    Tensor(
        "post_attention_layernorm.weight", "hidden_size", "post_attention_layernorm", "norms_before"
    ),
    Tensor("mlp.gate_proj.weight", "intermediate_size hidden_size", "mlp.gate_proj"),
    Tensor("mlp.gate_proj.bias", "intermediate_size", "mlp.gate_bias", "mlp_bias"),
    Tensor("mlp.up_proj.weight", "intermediate_size hidden_size", "mlp.up_proj"),
    Tensor("mlp.up_proj.bias", "intermediate_size", "mlp.up_bias", "mlp_bias"),
    Tensor("mlp.down_proj.weight", "hidden_size intermediate_size", "mlp.down_proj"),
    Tensor("mlp.down_proj.bias", "hidden_size", "mlp.down_bias", "mlp_bias"),
    Tensor("post_mlp_layernorm.weight", "hidden_size", "post_mlp_layernorm", "norms_after"),
)

# The tensors that each array of a layer holds.
ARRAYS: dict[str, list[Tensor]] = {}
for _tensor in TENSORS:
    ARRAYS.setdefault(_tensor.path, []).append(_tensor)


def axis_sizes(config: LlamaConfig) -> dict[str, int]:
    """The sizes that a config gives to the axes of a layer's arrays."""
    q_size = config.num_attention_heads * config.head_dim
    kv_size = config.num_key_value_heads * config.head_dim
    whole = config.qk_norm == "full"
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "num_heads": config.num_attention_heads,
        "q_size": q_size,
        "kv_size": kv_size,
        "q_norm_size": q_size if whole else config.head_dim,
        "k_norm_size": kv_size if whole else config.head_dim,
    }


@lru_cache(maxsize=8)
def tensors_of(config: LlamaConfig) -> dict[str, Tensor]:
    """The tensors that a layer has, by the names below it that files of the family have."""
    return {
        tensor_name(config.model_type, tensor.name): tensor
        for tensor in TENSORS
        if tensor.switch is None or getattr(config, tensor.switch)
    }


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a layer, by the names of `tensors_of`."""
    sizes = axis_sizes(config)
    return {
        name: tuple(sizes[axis] for axis in tensor.axes.split())
        for name, tensor in tensors_of(config).items()
    }


def array_shape(path: str, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    """The shape of the array at a path; an axis of unknown size keeps its name."""
    rows, *others = zip(*(tensor.axes.split() for tensor in ARRAYS[path]), strict=True)
    count = sizes.get(rows[0], rows[0]) if len(rows) == 1 else sum(sizes[row] for row in rows)
    return (count, *(sizes.get(axes[0], axes[0]) for axes in others))
