"""The weights of one rank, cut from named tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.group import Group
from llama_layers.model.llama import Llama
from llama_layers.model.weights import LlamaWeights
from llama_layers.parallel.plan import Shard


class Parts(Mapping[str, Array]):
    """The parts of named tensors that a rank has, cut when they are asked for."""

    def __init__(self, tensors: Mapping[str, Array], shard: Shard) -> None:
        self._tensors, self._shard = tensors, shard

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> Array:
        return self._shard.part(name, self._tensors[name])


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
    weights = LlamaWeights.from_named(Parts(tensors, shard), shard.config, group=group)
    return Llama(shard.config, weights)
