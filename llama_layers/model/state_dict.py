"""Weights from a state dict: arrays in memory, by the names that Hugging Face gives them."""

from __future__ import annotations

from collections.abc import Mapping

from llama_layers.arrays.dtypes import dtype_name, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, Namespace
from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import CheckpointError
from llama_layers.model.fused_tensors import unfused
from llama_layers.model.padding import without_padding
from llama_layers.model.quantised import why_not_plain
from llama_layers.model.rope_rows import permuted_heads, unpermute_rope_rows
from llama_layers.model.tensor_names import EMBEDDING, HEAD, TABLES
from llama_layers.model.weight_checks import is_inert, misfit, unfusible
from llama_layers.model.weights import LlamaWeights


def weights_of(mapping: Mapping[str, Array], config: LlamaConfig) -> LlamaWeights:
    """The weights in a state dict; only queries, keys and values are copied."""
    arrays = _arrays(mapping)
    for name in arrays.keys() & TABLES:
        arrays[name] = without_padding(arrays[name], config.vocab_size)
    xp = namespace(**arrays)
    arrays = _in_our_order(arrays, config)
    if config.tie_word_embeddings and HEAD in arrays:
        _check_tied(xp, arrays.pop(HEAD), arrays.get(EMBEDDING))
    if difference := misfit({name: tuple(a.shape) for name, a in arrays.items()}, config):
        raise CheckpointError(f"mapping: the tensors do not match the config: {difference}")
    dtypes = {name: dtype_name(array.dtype) for name, array in arrays.items()}
    if difference := unfusible(dtypes, range(config.num_hidden_layers), config.model_type):
        raise CheckpointError(f"mapping: {difference}: convert them to one")
    read = LlamaWeights.from_named(arrays, config)
    return LlamaWeights(read.embed_tokens, list(read.layers), read.norm, read.lm_head)


def _arrays(mapping: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays of the model."""
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"mapping: expected names with their arrays, as model.state_dict() gives them, "
            f"got {type(mapping).__name__}"
        )
    arrays = {}
    for name, array in mapping.items():
        if not isinstance(name, str):
            raise TypeError(f"mapping: expected names that are str, got {name!r}")
        if not is_inert(name):
            arrays[name] = array
    stored = {name: dtype_name(a.dtype) for name, a in arrays.items() if hasattr(a, "dtype")}
    if reason := why_not_plain(stored):
        raise CheckpointError(f"mapping: {reason}")
    for name, array in arrays.items():
        float_format(name, array)
        if getattr(array, "is_meta", False):  # as where accelerate keeps the weights elsewhere
            raise TypeError(f"{name}: expected a tensor with data, got one on the device meta")
    return arrays


def _in_our_order(arrays: Mapping[str, Array], config: LlamaConfig) -> dict[str, Array]:
    """The arrays of a family as this package has them: fused ones split, and rows in order."""
    family = FAMILIES[config.model_type]
    try:
        found = unfused(arrays, config, family.fused, lambda a, _, i, j: a[i:j, ...])
    except CheckpointError as error:
        raise CheckpointError(f"mapping: {error}") from None
    for name in found if family.interleaved else ():
        if (heads := permuted_heads(name, config)) is not None:
            found[name] = unpermute_rope_rows(found[name], heads, config.rotary_dim)
    return found


def _check_tied(xp: Namespace, head: Array, table: Array | None) -> None:
    """Raise unless a head that the config ties to the embedding equals it."""
    if table is None or head is table:
        return
    if (head.shape, head.dtype) != (table.shape, table.dtype) or not bool(xp.all(head == table)):
        raise CheckpointError(
            f"mapping: {HEAD} differs from {EMBEDDING}, and the config says "
            f"tie_word_embeddings = true"
        )
