"""A model: its config and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llama_layers.backends.namespaces import namespace
from llama_layers.config import LlamaConfig
from llama_layers.embedding import activations
from llama_layers.fitting import check_layer_count, check_weights
from llama_layers.weights import LlamaWeights

if TYPE_CHECKING:
    from llama_layers.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Llama:
    """A model.

    Attributes
    ----------
    config : LlamaConfig
        Its numbers.
    weights : LlamaWeights
        Its parameters.
    open_tokenizer : callable or None
        Opens the tokenizer that came with the weights.
    generation_config : Mapping of str to Any
        What the authors suggest for `generate`, as generation_config.json has it.

    Raises
    ------
    TypeError
        If an attribute is of another type.
    ValueError
        If the weights are of another number of layers or other shapes than the config says.
    """

    config: LlamaConfig
    weights: LlamaWeights = field(repr=False)
    open_tokenizer: Callable[[], Tokenizer] | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, kind in (("config", LlamaConfig), ("weights", LlamaWeights)):
            if not isinstance(given := getattr(self, name), kind):
                raise TypeError(f"{name}: expected {kind.__name__}, got {type(given).__name__}")
        if not (self.open_tokenizer is None or callable(self.open_tokenizer)):
            raise TypeError(
                f"open_tokenizer: expected a callable or None, "
                f"got {type(self.open_tokenizer).__name__}"
            )
        if not isinstance(self.generation_config, Mapping):
            kind = type(self.generation_config).__name__
            raise TypeError(f"generation_config: expected a mapping, got {kind}")
        check_weights(self.weights, self.config)

    def activations_like(self) -> Any:
        """An array of no elements, of the library, device and dtype of the activations."""
        none = self.weights.embed_tokens[:0, :]
        return activations(namespace(embed_tokens=none), none)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights.

        Returns
        -------
        Tokenizer
            Opened when it is first used.

        Raises
        ------
        CheckpointError
            If the checkpoint has none, or none that is known to be read correctly.
        ImportError
            If the package ``tokenizers`` is not installed.
        ValueError
            If the model is not from a checkpoint.
        """
        if self.open_tokenizer is None:
            raise ValueError("tokenizer: this model has none, since no checkpoint was loaded")
        return self.open_tokenizer()


def check_model(model: Any) -> None:
    """Refuse what is no model: the name of one, say, which `load` would have made one of.

    The layers may be a list, which can have become longer or shorter since the model was made.
    """
    if not isinstance(model, Llama):
        raise TypeError(f"model: expected a Llama, as load gives it, got {type(model).__name__}")
    check_layer_count(model.weights, model.config)
