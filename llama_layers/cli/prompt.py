"""The token ids of a text that a command was given."""

from __future__ import annotations

from collections.abc import Sequence

from llama_layers.model.llama import Llama


def prompt_ids(model: Llama, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
    """The ids of a text; a ValueError if it has no ids, or an id that the model does not have."""
    ids = model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise ValueError("text: expected at least one token, got none")
    if max(ids) >= (size := model.config.vocab_size):
        raise ValueError(
            f"text: its tokenizer gives the id {max(ids)}, and the model has {size} tokens: "
            f"tokenizer and model do not belong together"
        )
    return ids
