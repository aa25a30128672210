"""A model: its config and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llama_layers.backends.namespaces import namespace
from llama_layers.config import LlamaConfig
from llama_layers.embedding import activations
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
    """

    config: LlamaConfig
    weights: LlamaWeights = field(repr=False)
    open_tokenizer: Callable[[], Tokenizer] | None = None

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
