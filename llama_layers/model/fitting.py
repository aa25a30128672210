"""Whether weights have the shapes that a config says."""

from __future__ import annotations

from typing import Any

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.weights import LayerWeights, LlamaWeights


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a layer, in the order of `LayerWeights.named`, biases too."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    rows = heads + 2 * config.num_key_value_heads * config.head_dim
    return {
        "input_layernorm": (hidden,),
        "self_attn.qkv.fused": (rows, hidden),
        "self_attn.qkv.bias": (rows,),
        "self_attn.o_proj": (hidden, heads),
        "self_attn.o_bias": (hidden,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.gate_bias": (inner,),
        "mlp.up_proj": (inner, hidden),
        "mlp.up_bias": (inner,),
        "mlp.down_proj": (hidden, inner),
        "mlp.down_bias": (hidden,),
    }


def layer_fits(layer: Any, config: LlamaConfig) -> bool:
    """Whether a layer has the heads and, as of now, the shapes that a config says."""
    return layer_problem(layer, config) is None


def layer_problem(layer: Any, config: LlamaConfig) -> str | None:
    """What of a layer is not as a config says; None if all is."""
    if not isinstance(layer, LayerWeights):
        return f": expected LayerWeights, got {type(layer).__name__}"
    qkv = layer.self_attn.qkv
    for name, found, expected in (
        ("num_heads", qkv.num_heads, config.num_attention_heads),
        ("num_kv_heads", qkv.num_kv_heads, config.num_key_value_heads),
    ):
        if found != expected:
            return f".self_attn.qkv: expected {name} = {expected}, as config says, got {found}"
    shapes = layer_shapes(config)
    for name, array in layer.named().items():
        if array is not None and tuple(array.shape) != shapes[name]:
            return (
                f".{name}: expected shape {list(shapes[name])}, as config says, "
                f"got {list(array.shape)}"
            )
    return None


def check_layer_count(weights: LlamaWeights, config: LlamaConfig) -> None:
    """Refuse weights of more or fewer layers than a config says."""
    if (layers := len(weights.layers)) != config.num_hidden_layers:
        raise ValueError(
            f"weights: expected {config.num_hidden_layers} layers, as config says, got {layers}"
        )


def check_weights(weights: LlamaWeights, config: LlamaConfig) -> None:
    """Refuse weights that do not fit a config.

    Weights of a checkpoint that were not read yet are left alone: they are checked against the
    config of the checkpoint when it is opened, and every use looks at them again.
    """
    check_layer_count(weights, config)
    table = (config.vocab_size, config.hidden_size)
    read = vars(weights)
    for name, shape in (("embed_tokens", table), ("norm", table[1:]), ("lm_head", table)):
        if name in read and tuple(read[name].shape) != shape:
            raise ValueError(
                f"weights: {name}: expected shape {list(shape)}, as config says, "
                f"got {list(read[name].shape)}"
            )
    if isinstance(weights.layers, list | tuple):
        for index, layer in enumerate(weights.layers):
            if (problem := layer_problem(layer, config)) is not None:
                raise ValueError(f"weights: layers[{index}]{problem}")
