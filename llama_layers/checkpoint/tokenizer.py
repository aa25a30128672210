"""Text to token ids and back, with the tokenizer that came with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_layers.checkpoint.extras import require
from llama_layers.errors import CheckpointError


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        What does the work.
    """

    def __init__(self, backend: Any, /) -> None:
        # Files written during training may ask to cut or pad every text to one length.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def encode(self, text: str, /) -> list[int]:
        """Turn a text into token ids.

        Parameters
        ----------
        text : str
            Any text. The names of special tokens in it become those tokens.

        Returns
        -------
        list of int
            With the tokens that the checkpoint's tokenizer adds to every text, such as the one
            that begins it.
        """
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, ids: Iterable[int], /) -> str:
        """Turn token ids into the text they stand for.

        Parameters
        ----------
        ids : iterable of int
            Token ids.

        Returns
        -------
        str
            The text, special tokens included.
        """
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def to_json(self) -> str:
        """The content of a tokenizer.json that says the same.

        Returns
        -------
        str
            JSON.
        """
        content: str = self._backend.to_str(pretty=True)
        return content


def open_tokenizer_json(file: Path) -> Tokenizer:
    """Read a tokenizer.json."""
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent}: has no tokenizer.json, so text cannot be tokenised; pass token ids, "
            f"or put the tokenizer.json of the model there"
        )
    tokenizers = require("tokenizers", "reading tokenizer.json")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file}: expected a tokenizer.json: {error}") from None
