"""The model of one rank, cut from named tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping

from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.group import Group
from llama_layers.model.llama import Llama
from llama_layers.model.weights import LlamaWeights
from llama_layers.parallel.plan import Shard


def sharded(tensors: Mapping[str, Array], config: LlamaConfig, group: Group, /) -> Llama:
    """Give this rank of a group its part of a model.

    Parameters
    ----------
    tensors : Mapping of str to Array
        The tensors of the whole model, by their names in Hugging Face's model.
    config : LlamaConfig
        The numbers of the whole model.
    group : Group
        The ranks.

    Returns
    -------
    Llama
        A model with the heads and channels of this rank. Its `forward` gives the logits of the
        whole model, if every rank calls it with the same arguments.
    """
    shard = Shard(config, group.rank, group.size)
    parts = {name: shard.part(name, tensor) for name, tensor in tensors.items()}
    weights = LlamaWeights.from_named(parts, shard.config, group=group)
    return Llama(shard.config, weights)
