"""The arrays of a model, by the names that Hugging Face gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol, overload, runtime_checkable

from llama_layers.arrays.brief import brief_value
from llama_layers.arrays.checks import check_shape
from llama_layers.arrays.copies import DeepCopied, deep_copied, may_change
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.pytrees import Tree, offer, offer_to_jax, unchecked
from llama_layers.arrays.transfer import writable_like
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import CheckpointError
from llama_layers.layers.group import Group
from llama_layers.layers.tensors import Names
from llama_layers.layers.weights import LayerWeights, layer_problem, read_layer
from llama_layers.model.padding import without_padding
from llama_layers.model.tensor_names import (
    EMBEDDING,
    HEAD,
    NORM,
    TABLES,
    expected_tensors,
    layer_name,
)


@dataclass(frozen=True, eq=False)
class LlamaWeights(DeepCopied):
    """The parameters of a model.

    Attributes
    ----------
    embed_tokens : Array, shape [vocab_size, hidden_size]
        One row for each token id.
    layers : sequence of LayerWeights
        From the first layer to the last.
    norm : Array, shape [hidden_size]
        Weight of the norm after the last layer.
    lm_head : Array, shape [vocab_size, hidden_size]
        Into logits; the very array of `embed_tokens` where the config ties the two. It and
        `embed_tokens` may have rows of padding below, which `Llama` drops.
    group : Group or None
        Where set, the layers are the parts of one rank of a group.

    Raises
    ------
    TypeError
        If `layers` is not a sequence of LayerWeights, or an array does not hold floats or comes
        from another library than the first.
    ValueError
        If the shapes do not fit each other. Layers that a sequence of another kind than list and
        tuple makes when they are asked for are checked when they are used.
    """

    embed_tokens: Array
    layers: Sequence[LayerWeights]
    norm: Array
    lm_head: Array
    group: Group | None = None

    def __post_init__(self) -> None:
        namespace(embed_tokens=self.embed_tokens, norm=self.norm, lm_head=self.lm_head)
        check_shape("embed_tokens", self.embed_tokens, "vocab_size", "hidden_size")
        hidden = self.embed_tokens.shape[1]
        check_shape("norm", self.norm, hidden)
        check_shape("lm_head", self.lm_head, "vocab_size", hidden)
        if not isinstance(self.layers, Sequence):
            raise TypeError(
                f"layers: expected a sequence of LayerWeights, got {type(self.layers).__name__}"
            )
        for index, layer in enumerate(self.layers if isinstance(self.layers, list | tuple) else ()):
            if not isinstance(layer, LayerWeights):
                raise TypeError(
                    f"layers[{index}]: expected LayerWeights, got {type(layer).__name__}"
                )
            for attribute, norm in layer.norms().items():
                name = f"layers[{index}].{attribute}"
                namespace(embed_tokens=self.embed_tokens, **{name: norm})
                check_shape(name, norm, hidden)

    def __repr__(self) -> str:
        """What is known without reading an array."""
        read, layers = vars(self), self.layers
        count = f"{len(layers)} layers" if isinstance(layers, Sequence) else brief_value(layers)
        said = [
            f"{name}={brief_value(read[name]) if name in read else 'not read yet'}"
            for name in ("embed_tokens", "norm", "lm_head")
        ]
        return f"LlamaWeights({', '.join([count, *said])})"

    @classmethod
    def from_named(
        cls, arrays: Mapping[str, Array], config: LlamaConfig, *, group: Group | None = None
    ) -> LlamaWeights:
        """Make a model's weights from arrays by the names that Hugging Face gives them.

        Each array is taken from the mapping when it is first used, and then kept. So the mapping
        may read files, and arrays that are never used cost nothing. Queries, keys and values become
        one array for each layer: a copy, unless the mapping is a `RowMapping`.

        Parameters
        ----------
        arrays : Mapping of str to Array
            At least the `expected_tensors` of the config, with the rows of queries and keys in the
            order of Hugging Face's Llama in every family. Rows of embedding and head beyond its
            ``vocab_size`` are padding, and left out.
        config : LlamaConfig
            The numbers of the model.
        group : Group, optional
            Where given, `arrays` and `config` are the part of one of its ranks.

        Returns
        -------
        LlamaWeights
            The weights. An array of another shape than the config's raises ValueError when it is
            first used.

        Raises
        ------
        CheckpointError
            If an array is missing.
        TypeError
            If an argument has a wrong type.

        Examples
        --------
        >>> import numpy as np
        >>> from llama_layers import LlamaConfig, LlamaWeights
        >>> from llama_layers.checkpoint import expected_tensors
        >>> config = LlamaConfig.smollm2_135m()
        >>> shapes = expected_tensors(config)
        >>> arrays = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
        >>> LlamaWeights.from_named(arrays, config).layers[0].self_attn.qkv.fused.shape
        (960, 576)
        """
        for argument, value, kind in (
            ("arrays", arrays, Mapping),
            ("config", config, LlamaConfig),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"{argument}: expected a {kind.__name__}, got {type(value).__name__}"
                )
        shapes = expected_tensors(config)
        for name in shapes:
            if name not in arrays:
                raise CheckpointError(f"arrays: expected {name}, got no array of that name")
        offer_to_jax()  # since no array has come yet
        source = _Source(arrays, config)
        layers = _Layers(source, config, group, {})
        weights: LlamaWeights = unchecked(
            _ReadWhenUsed, source=source, config=config, layers=layers, group=group
        )
        return weights

    def named(self, model_type: str = "llama") -> dict[str, Array]:
        """Every tensor of the model under its name in Hugging Face's model.

        Parameters
        ----------
        model_type : str, optional
            The family whose names they are, ``config.model_type`` for `from_named` to read them.

        Returns
        -------
        dict of str to Array
            In the order of `expected_tensors`. A head that is the embedding itself is left out, as
            files leave it out.
        """
        found = {EMBEDDING: self.embed_tokens}
        for index, layer in enumerate(self.layers):
            named = layer.named(model_type)
            found |= {layer_name(index, name): array for name, array in named.items()}
        found[NORM] = self.norm
        if self.lm_head is not self.embed_tokens:
            found[HEAD] = self.lm_head
        return found


@runtime_checkable
class RowMapping(Protocol):
    """A mapping of names to arrays that may have several of them in one piece, as a file has."""

    def rows(self, names: Names) -> Array:
        """Give arrays, or a single one, as one array: their rows below each other."""


class _Source:
    """Arrays by name, and the shapes that they should have."""

    def __init__(self, arrays: Mapping[str, Array], config: LlamaConfig) -> None:
        self.arrays, self._config, self._shapes = arrays, config, expected_tensors(config)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Source, (self.arrays, self._config)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Source:
        return _Source(deep_copied(self.arrays, memo), self._config)

    def rows(self, names: Names) -> Array:
        """Give arrays as one: their rows below each other. A file's shapes are checked already."""
        if isinstance(self.arrays, RowMapping) and names[0] not in TABLES:
            return self.arrays.rows(names)
        parts = {name: self.arrays[name] for name in names}
        for name in parts.keys() & TABLES:
            parts[name] = without_padding(parts[name], self._shapes[name][0])
        xp = namespace(**parts)
        for name, array in parts.items():
            check_shape(name, array, *self._shapes[name])
        if len(names) == 1:
            return parts[names[0]]
        return writable_like(xp.concat([*parts.values()]), parts.values())


class _ReadWhenUsed(LlamaWeights):
    """Weights from named arrays; `replace` makes another of values for the fields themselves."""

    source: _Source
    config: LlamaConfig

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy where the arrays come from, and those read that may have changed since.

        All of them if `replace` made these weights.
        """
        state = dict(vars(self))
        if "source" in state:
            for name in ("embed_tokens", "norm", "lm_head"):
                if name in state and not may_change(state[name]):
                    del state[name]
            state["layers"] = copy(state["layers"])  # which keeps by itself what it reads
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        offer_to_jax()
        vars(self).update(state)

    @cached_property
    def embed_tokens(self) -> Array:
        return self.source.rows((EMBEDDING,))

    @cached_property
    def norm(self) -> Array:
        return self.source.rows((NORM,))

    @cached_property
    def lm_head(self) -> Array:
        tied = self.config.tie_word_embeddings
        return self.embed_tokens if tied else self.source.rows((HEAD,))


class _Layers(Sequence[LayerWeights]):
    """Layers from named arrays, each made when it is first used and then kept."""

    def __init__(
        self,
        source: _Source,
        config: LlamaConfig,
        group: Group | None,
        made: dict[int, LayerWeights],
    ) -> None:
        self._source, self._config, self._group, self._made = source, config, group, made

    def __repr__(self) -> str:
        return f"{len(self)} layers, {len(self._made)} of them read"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy where the layers come from, and those made that may have changed."""
        changeable = {
            number: layer
            for number, layer in self._made.items()
            if any(array is not None and may_change(array) for array in layer.arrays().values())
        }
        return _Layers, (self._source, self._config, self._group, changeable)

    def __len__(self) -> int:
        return self._config.num_hidden_layers

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | list[LayerWeights]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]
        if (layer := self._made.get(number)) is None:
            layer = self._made[number] = self._make(number)
        return layer

    def _make(self, number: int) -> LayerWeights:
        def read(names: Names) -> Array:
            return self._source.rows(tuple(layer_name(number, name) for name in names))

        layer = read_layer(read, self._config, self._group)
        if (problem := layer_problem(layer, self._config)) is not None:
            raise ValueError(f"weights: layers[{number}]{problem}")
        return layer


def weights_without_padding(weights: LlamaWeights, config: LlamaConfig) -> LlamaWeights:
    """The weights with embedding and head of `vocab_size` rows, if they have as many."""
    read, tokens = vars(weights), config.vocab_size
    if isinstance(weights, _ReadWhenUsed) and "source" in read:
        if weights.config.vocab_size == tokens:
            return weights
        return LlamaWeights.from_named(weights.source.arrays, config, group=weights.group)
    embedding, head = weights.embed_tokens, weights.lm_head
    table = without_padding(embedding, tokens)
    first = table if head is embedding else without_padding(head, tokens)
    if table is embedding and first is head:
        return weights
    return replace(weights, embed_tokens=table, lm_head=first)


def _split(weights: LlamaWeights) -> tuple[dict[str, Any], tuple[bool, Group | None]]:
    """The parts of weights as jax may change them; whether one array is embedding and head; ranks.

    That array is one part, so that its gradient is the sum of both uses. What it was is remembered
    where jax puts other things than arrays into weights.
    """
    tied = vars(weights).get("tied", weights.lm_head is weights.embed_tokens)
    layers = weights.layers
    if isinstance(layers, Sequence) and not isinstance(layers, list | tuple | str):
        layers = list(layers)
    parts = {"embed_tokens": weights.embed_tokens, "layers": layers, "norm": weights.norm}
    head = {} if tied else {"lm_head": weights.lm_head}
    return parts | head, (tied, weights.group)


def _join(
    kind: type[LlamaWeights], parts: dict[str, Any], others: tuple[bool, Group | None]
) -> LlamaWeights:
    tied, group = others
    head = {"lm_head": parts["embed_tokens"]} if tied else {}
    weights: LlamaWeights = unchecked(kind, **parts, **head, tied=tied, group=group)
    return weights


for _kind in (LlamaWeights, _ReadWhenUsed):  # jax tells kinds apart, so each stays what it is
    offer(Tree(_kind, _split, partial(_join, _kind)))


def all_read(weights: LlamaWeights) -> LlamaWeights:
    """The weights with every array read."""
    lazy = isinstance(weights, _ReadWhenUsed)
    return _join(LlamaWeights, *_split(weights)) if lazy else weights


def check_layer_count(weights: LlamaWeights, config: LlamaConfig) -> None:
    """Raise unless the weights have the number of layers that a config says."""
    if (layers := len(weights.layers)) != config.num_hidden_layers:
        raise ValueError(
            f"weights: expected {config.num_hidden_layers} layers, as config says, got {layers}"
        )


def check_weights(weights: LlamaWeights, config: LlamaConfig) -> None:
    """Raise unless the weights fit a config.

    Arrays that were not read yet are skipped: a checkpoint is checked against its config when it is
    opened, and a layer when it is first used.
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
