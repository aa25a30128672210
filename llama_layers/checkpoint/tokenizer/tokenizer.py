"""The tokenizer that came with a checkpoint: text to token ids and back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_layers.checkpoint.extras import require
from llama_layers.checkpoint.tokenizer.chat import chosen_template, render_chat
from llama_layers.errors import CheckpointError

# Decoders give this for bytes that are not a character, or not yet.
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    backend : tokenizers.Tokenizer
        The tokenizer that does the work.
    chat_template : str or mapping of str to str, optional
        The Jinja template of the model's chat format, or several by name.
    special_tokens : mapping of str to str, optional
        The tokens that templates may name, such as ``bos_token``.
    template_files : mapping of str to path, optional
        The file that the text of a template comes from, which errors about it name.

    Raises
    ------
    TypeError
        If `backend` is of another type.
    ImportError
        If the package ``tokenizers`` is not installed.
    """

    def __init__(
        self,
        backend: Any,
        /,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        template_files: Mapping[str, Path] | None = None,
    ) -> None:
        kind = require("tokenizers", "text").Tokenizer
        if not isinstance(backend, kind):
            raise TypeError(
                f"backend: expected a tokenizers.Tokenizer, got {type(backend).__name__}"
            )
        # Files written during training may ask to cut or pad every text to one length.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self._template_files = dict(template_files or {})

    def __repr__(self) -> str:
        return f"Tokenizer({self._backend.get_vocab_size()} tokens)"

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
        TypeError
            If `text` is not a str.
        ValueError
            If the text has half of a surrogate pair, which is not a character.
        CheckpointError
            If the tokenizer cannot encode this text: its unknown token is not in its vocabulary,
            say, or one of its regular expressions takes too long.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: expected valid Unicode, got {text[error.start]!r} at position {error.start}"
            ) from None
        with backend_errors("the tokenizer cannot encode this text"):
            return self._backend.encode(text, add_special_tokens=bool(add_special_tokens)).ids

    def decode(self, ids: Iterable[int], /, *, skip_special_tokens: bool = False) -> str:
        """Turn token ids into the text they stand for.

        Parameters
        ----------
        ids : iterable of int
            Token ids. Those that the tokenizer does not have give no text: many models have
            more rows in their embedding than tokens.
        skip_special_tokens : bool
            Whether to leave special tokens out.

        Returns
        -------
        str
            The text.

        Raises
        ------
        TypeError
            If an id is not an integer.
        ValueError
            If an id is negative.
        CheckpointError
            If the tokenizer cannot decode these ids.
        """
        known = [i for i in map(_checked_id, ids) if i < 2**32]
        with backend_errors("the tokenizer cannot decode these ids"):
            return self._backend.decode(known, skip_special_tokens=bool(skip_special_tokens))

    def stream(self, ids: Iterable[int], /) -> Iterator[str]:
        """Turn token ids into text as they come.

        Parameters
        ----------
        ids : iterable of int
            Token ids, such as `generate` gives them.

        Yields
        ------
        str
            Pieces of the text, special tokens left out; joined, they are what `decode` gives with
            ``skip_special_tokens=True``. A character of several tokens comes when it is whole.

        Raises
        ------
        TypeError
            If an id is not an integer.
        ValueError
            If an id is negative.
        """
        added = self._backend.get_added_tokens_decoder()
        skipped = {i for i, token in added.items() if token.special}
        kept = (i for i in map(_checked_id, ids) if self._token(i) is not None and i not in skipped)
        for piece in stream_text(kept, self.decode, self._token):
            if piece:
                yield piece

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: object,
    ) -> str:
        """Write a conversation in the model's chat format.

        The text is what transformers' method of this name gives for the same files.

        Parameters
        ----------
        messages : sequence of mappings
            Each with a ``role``, such as "user", and its ``content``. A control token that is
            spelled out in the content becomes that token when the text is encoded, as in
            transformers, and may so end the message or begin another: filter a text that is not
            trusted.
        add_generation_prompt : bool
            Whether to begin the model's answer.
        tools : sequence of mappings, optional
            Functions that the model may call, each as a JSON schema.
        documents : sequence of mappings, optional
            Texts that the model may read, each with a ``title`` and a ``text``.
        chat_template : str, optional
            The name of the template, where the checkpoint has several: "tool_use" if there are
            tools and there is one of that name, "default" otherwise.
        **variables
            Other variables of this template, such as ``enable_thinking=False``.

        Returns
        -------
        str
            Text for `encode` with ``add_special_tokens=False``.

        Raises
        ------
        TypeError
            If messages, tools or documents are not sequences of mappings, or if a variable is an
            option of transformers' method that is not supported, such as ``tokenize=True``.
        ValueError
            If there is no message, or no template of that name.
        CheckpointError
            If the checkpoint has no template, or its template fails: because it refuses this kind
            of conversation, or because it tries something that its sandbox does not allow.

        Examples
        --------
        >>> talk = [{"role": "user", "content": "Name an ocean."}]
        >>> load("smollm2-135m").tokenizer.apply_chat_template(talk)  # doctest: +SKIP
        '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, ...'
        """
        template = chosen_template(self.chat_template, chat_template, tools=tools is not None)
        return render_chat(
            template,
            self._template_files.get(template),
            messages,
            tools,
            documents,
            self.special_tokens,
            variables | {"add_generation_prompt": add_generation_prompt},
        )

    def _token(self, i: int) -> str | None:
        return self._backend.id_to_token(i) if i < 2**32 else None


@contextmanager
def backend_errors(problem: str) -> Iterator[None]:
    """Turn an error of the tokenizers package into a CheckpointError that begins with the problem.

    The package raises Exception itself, and its panics are BaseExceptions that no module exports.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise CheckpointError(f"{problem}: {error}") from None
        raise


def _checked_id(i: Any) -> int:
    try:
        number = operator.index(i)
    except TypeError:
        raise TypeError(f"ids: expected integers, got {type(i).__name__}") from None
    if number < 0:
        raise ValueError(f"ids: expected token ids, zero or more, got {number}")
    return number


def stream_text(
    ids: Iterable[int],
    decode: Callable[[Sequence[int]], str],
    token: Callable[[int], str | None],
) -> Iterator[str]:
    """Pieces of the text of some ids, which joined are what `decode` gives for all of them.

    Text waits while tokens to come may still change it: while it ends within a character, and
    while it ends in tokens of one byte each, ``<0x0A>``, since a wrong one spoils those before it.
    Only ids since the piece before the last are decoded again: those of the last piece are the
    context of the next, since many decoders drop a space that begins a text.
    """
    window: list[int] = []
    given, seen = 0, ""  # how many of the ids in the window have been given, and their text
    for i in ids:
        window.append(i)
        if _is_byte(token(i)):
            continue
        text = decode(window)
        if text == seen or not text.startswith(seen) or text.endswith(_REPLACEMENT):
            continue
        yield text[len(seen) :]
        last = window[given:]
        if alone := decode(last):  # a dropped space gives no context
            window, text = last, alone
        given, seen = len(window), text
    text = decode(window)
    if text.startswith(seen):
        yield text[len(seen) :]


def _is_byte(token: str | None) -> bool:
    return token is not None and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
