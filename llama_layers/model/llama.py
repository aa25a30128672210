"""A model: its config and weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.pytrees import Tree, offer, offer_to_jax, unchecked
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.model.embedding import activations
from llama_layers.model.state_dict import weights_of
from llama_layers.model.tensor_names import expected_tensors
from llama_layers.model.weights import (
    LlamaWeights,
    all_read,
    check_layer_count,
    check_weights,
    weights_without_padding,
)


class Tokenizer(Protocol):
    """What turns text into token ids and back: `llama_layers.checkpoint.Tokenizer`."""

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        """Give the ids of a text."""

    def decode(self, ids: Iterable[int], /, *, skip_special_tokens: bool = False) -> str:
        """Give the text of ids."""

    def stream(self, ids: Iterable[int], /) -> Iterator[str]:
        """Give the text of ids piece by piece, while they come."""

    @property
    def apply_chat_template(self) -> Callable[..., str]:
        """A function that gives messages in the format that the model was trained on."""


@runtime_checkable
class HasDict(Protocol):
    """A config of transformers, which need not be installed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of its config.json."""


@dataclass(frozen=True, eq=False)
class Llama:
    """A model.

    Attributes
    ----------
    config : LlamaConfig
        The numbers of the model.
    weights : LlamaWeights
        The parameters of the model. Rows of embedding and head beyond ``config.vocab_size`` are
        padding: no token is theirs, and the model is made without them.
    open_tokenizer : callable or None
        Opens the tokenizer that came with the weights.
    generation_config : Mapping of str to Any
        The authors' suggestions for `generate`, from generation_config.json.

    Raises
    ------
    TypeError
        If an attribute is of another type.
    ValueError
        If the number of layers or the shapes differ from the config.
    """

    config: LlamaConfig
    weights: LlamaWeights = field(repr=False)
    open_tokenizer: Callable[[], Tokenizer] | None = field(default=None, repr=False)
    generation_config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        offer_to_jax()
        kinds = {"config": LlamaConfig, "weights": LlamaWeights, "generation_config": Mapping}
        for name, kind in kinds.items():
            if not isinstance(given := getattr(self, name), kind):
                raise TypeError(f"{name}: expected {kind.__name__}, got {type(given).__name__}")
        if not (self.open_tokenizer is None or callable(self.open_tokenizer)):
            raise TypeError(
                f"open_tokenizer: expected a callable or None, "
                f"got {type(self.open_tokenizer).__name__}"
            )
        weights = weights_without_padding(self.weights, self.config)
        check_weights(weights, self.config)
        object.__setattr__(self, "weights", weights)  # since the dataclass is frozen

    def __repr__(self) -> str:
        config, shapes = self.config, expected_tensors(self.config).values()
        return (
            f"Llama({config.model_type}: {config.num_hidden_layers} layers, hidden size "
            f"{config.hidden_size}, vocabulary {config.vocab_size}, "
            f"{sum(map(math.prod, shapes)):,} parameters, {self.weights!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy all but the tokenizer, which is opened again when it is used."""
        return {name: value for name, value in vars(self).items() if name != "tokenizer"}

    @classmethod
    def from_state_dict(
        cls,
        mapping: Mapping[str, Array],
        /,
        config: LlamaConfig | Mapping[str, Any] | str | os.PathLike[str] | HasDict,
    ) -> Llama:
        """Make a model from weights in memory.

        The arrays stay where they are and as they are: of their library, on their device, in their
        dtype. Only queries, keys and values are copied, into one matrix for each layer.

        Parameters
        ----------
        mapping : Mapping of str to Array
            The ``state_dict()`` of transformers' ``LlamaForCausalLM``, or of the class of another
            family, which may fuse matrices and order rows in its own way, or arrays of any one
            library by the same names. Gradients flow to tensors that require them: those of
            ``dict(model.named_parameters())`` do, those of ``state_dict()`` do not. Buffers
            of RoPE are ignored, and so are a head that the config ties to the embedding, and rows
            of the two beyond ``vocab_size``.
        config : LlamaConfig, config of transformers, mapping, str or path
            The numbers of the model: anything that `LlamaConfig.from_json` takes, or an object
            with a method ``to_dict`` that returns it, as transformers' configs have.

        Returns
        -------
        Llama
            The model, without a tokenizer.

        Raises
        ------
        CheckpointError
            If the arrays do not match `config` (one is missing, unexpected or of another shape),
            are quantised, or have names with a prefix.
        ConfigError
            If `config` is incomplete or asks for something that is not implemented.
        TypeError
            If a value is not an array of floats, or comes from another library than the first.
        ValueError
            If an array is on another device than the first.

        Examples
        --------
        >>> import numpy as np
        >>> from llama_layers import Llama, LlamaConfig
        >>> from llama_layers.checkpoint import expected_tensors
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, rms_norm_eps=1e-5, rope_theta=1e4,
        ...     max_position_embeddings=64,
        ... )
        >>> shapes = expected_tensors(config)
        >>> arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        >>> Llama.from_state_dict(arrays, config).weights.norm.shape
        (8,)
        """
        if isinstance(config, HasDict):
            config = config.to_dict()
        if not isinstance(config, LlamaConfig | Mapping | str | os.PathLike):
            raise TypeError(
                f"config: expected a LlamaConfig, a config of transformers, a mapping or a path, "
                f"got {type(config).__name__}"
            )
        if not isinstance(config, LlamaConfig):
            config = LlamaConfig.from_json(config)
        return cls(config, weights_of(mapping, config))

    def activations_like(self) -> Array:
        """Give an empty array of the library, device and dtype of the activations."""
        empty = self.weights.embed_tokens[:0, :]
        return activations(namespace(embed_tokens=empty), empty)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights, opened when it is first used.

        Returns
        -------
        Tokenizer
            As `llama_layers.checkpoint.load_tokenizer` opens it.

        Raises
        ------
        CheckpointError
            If the checkpoint has no tokenizer, or one that would not be read correctly.
        ImportError
            If the package ``tokenizers`` is not installed.
        ValueError
            If the model is not from a checkpoint.
        """
        if self.open_tokenizer is None:
            raise ValueError(
                "tokenizer: this model has none, since it was not loaded from a checkpoint; "
                "llama_layers.checkpoint.load_tokenizer opens one"
            )
        return self.open_tokenizer()


class _Static:
    """All of a model but its arrays, as jax compares it to see whether it has compiled for it."""

    def __init__(self, model: Llama) -> None:
        self.fields = {f.name: getattr(model, f.name) for f in fields(model) if f.name != "weights"}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.fields == other.fields

    def __hash__(self) -> int:
        return hash(self.fields["config"])  # the others may be dicts


def _split(model: Llama) -> tuple[dict[str, Any], _Static]:
    return {"weights": all_read(model.weights)}, _Static(model)


def _join(parts: dict[str, Any], static: _Static) -> Llama:
    model: Llama = unchecked(Llama, **parts, **static.fields)
    return model


offer(Tree(Llama, _split, _join))


def check_model(model: Llama) -> None:
    """Raise unless this is a model, and not the name of one, say, that `load` takes.

    The layers may be a list, whose length can have changed since the model was made.
    """
    if not isinstance(model, Llama):
        raise TypeError(f"model: expected a Llama, as load gives it, got {type(model).__name__}")
    check_layer_count(model.weights, model.config)
