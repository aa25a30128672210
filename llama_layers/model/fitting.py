"""Whether weights have the shapes that a config says."""

from __future__ import annotations

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.weights import layer_problem
from llama_layers.model.weights import LlamaWeights


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
