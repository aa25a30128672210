"""Text to token ids and back, with the tokenizer that came with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_layers.checkpoint.chat import render_chat
from llama_layers.checkpoint.extras import require
from llama_layers.errors import CheckpointError


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        What does the work.
    chat_template : str, optional
        The Jinja template of the model's chat format.
    special_tokens : mapping of str to str, optional
        What the template may call ``bos_token`` and ``eos_token``.
    """

    def __init__(
        self,
        backend: Any,
        /,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # Files written during training may ask to cut or pad every text to one length.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})

    def encode(self, text: str, /, *, add_special_tokens: bool = True) -> list[int]:
        """Turn a text into token ids.

        Parameters
        ----------
        text : str
            Any text. The names of special tokens in it become those tokens.
        add_special_tokens : bool
            Whether to add the tokens that the checkpoint's tokenizer adds to every text, such as
            the one that begins it. The text of `apply_chat_template` has them already.

        Returns
        -------
        list of int
            Token ids.

        Raises
        ------
        ValueError
            If the text has half of a surrogate pair, which is no character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: expected valid Unicode, got {text[error.start]!r} at position {error.start}"
            ) from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
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

    def stream(self, ids: Iterable[int], /) -> Iterator[str]:
        """Turn token ids into text as they come.

        Parameters
        ----------
        ids : iterable of int
            Token ids, such as `generate` gives them.

        Yields
        ------
        str
            Pieces of the text, special tokens left out. A character of several tokens comes when
            it is whole.
        """
        decoders = require("tokenizers.decoders", "streaming text")
        decoder = decoders.DecodeStream(skip_special_tokens=True)
        for i in ids:
            if piece := decoder.step(self._backend, int(i)):
                yield piece

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation in the model's chat format.

        Parameters
        ----------
        messages : sequence of mappings
            Each with a ``role``, such as "user", and its ``content``. A control token that is
            spelled out in the content becomes that token when the text is encoded, as in
            transformers, and may so end the message or begin another: filter a text that is not
            trusted.
        add_generation_prompt : bool
            Whether to begin the model's answer.

        Returns
        -------
        str
            Text for `encode` with ``add_special_tokens=False``.

        Raises
        ------
        CheckpointError
            If the checkpoint has no template, or its template fails: because the conversation is
            of a kind that it refuses, or because it tries what its sandbox does not allow.
        ImportError
            If the package ``jinja2`` is not installed.
        """
        if self.chat_template is None:
            raise CheckpointError("chat_template: this checkpoint has none; it is no chat model")
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self._special_tokens,
        )


def open_tokenizer_json(file: Path) -> Any:
    """Read a tokenizer.json with the tokenizers package."""
    if not file.is_file():
        raise CheckpointError(
            f"{file.parent}: has no tokenizer.json, so text cannot be tokenised: "
            f"put the tokenizer.json of the model there"
        )
    tokenizers = require("tokenizers", "reading tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{file}: expected a tokenizer.json: {error}") from None
