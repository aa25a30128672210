"""The names of the tensors of a model, and their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llama_layers.config.families import tensor_name
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.tensors import ARRAYS, Names, tensor_shapes

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# The tensors with a row for each token. Some more rows are padding, often to a multiple of 64: no
# token is theirs, and they are dropped where weights come in.
TABLES = (EMBEDDING, HEAD)


def layer_name(layer: int, name: str) -> str:
    """The name in the model of a tensor or module that is below a layer."""
    return f"model.layers.{layer}.{name}"


def layer_arrays(layer: int, model_type: str) -> list[Names]:
    """The tensors of a layer, those that become one array together; biases too."""
    return [
        tuple(layer_name(layer, tensor_name(model_type, tensor.name)) for tensor in tensors)
        for tensors in ARRAYS.values()
    ]


def expected_tensors(config: LlamaConfig, /) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of a config must hold.

    Parameters
    ----------
    config : LlamaConfig
        Its numbers.

    Returns
    -------
    dict of str to tuple of int
        Hugging Face names and shapes, in the order in which `convert` writes them: the query, key
        and value rows of a layer next to each other, so that they map into memory as one matrix.

    Examples
    --------
    >>> from llama_layers import LlamaConfig
    >>> from llama_layers.checkpoint import expected_tensors
    >>> shapes = expected_tensors(LlamaConfig.llama3_1_8b())
    >>> len(shapes), shapes["model.layers.0.self_attn.k_proj.weight"]
    (291, (1024, 4096))
    """
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table}
    of_layer = tensor_shapes(config)
    for layer in range(config.num_hidden_layers):
        shapes |= {layer_name(layer, name): shape for name, shape in of_layer.items()}
    shapes[NORM] = table[1:]
    if not config.tie_word_embeddings:
        shapes[HEAD] = table
    return shapes


def renamed(name: str, modules: Mapping[str, str]) -> str | None:
    """The name of a tensor after its module was looked up in a table; None if it is not there."""
    module, _, kind = name.rpartition(".")
    layers = r"((?:model\.layers|transformer\.h|layers|blk)\.)(0|[1-9]\d*)(\..+)"
    numbered = re.fullmatch(layers, module)
    template = f"{numbered[1]}{{}}{numbered[3]}" if numbered else module
    found = modules.get(template)
    if found is None or ("{}" in template) != bool(numbered):
        return None
    return f"{found.format(numbered[2]) if numbered else found}.{kind}"
