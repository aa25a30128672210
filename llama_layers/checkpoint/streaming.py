"""Token ids to text as they come: together the text of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

# What decoders give for bytes that are not a character, or not yet.
_REPLACEMENT = "\ufffd"


def stream_text(
    ids: Iterable[int],
    decode: Callable[[Sequence[int]], str],
    token: Callable[[int], str | None],
) -> Iterator[str]:
    """Pieces of the text of some ids, which joined are what `decode` gives for all of them.

    Text waits while tokens to come may still change it: while it ends within a character, and
    while it ends in tokens of one byte each, ``<0x0A>``, of which a wrong one spoils those before
    it. Only ids since the piece before the last are decoded again: those of the last piece are
    the context of the next, since many decoders drop a space that begins a text.
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
        if alone := decode(last):  # a dropped space is no context
            window, text = last, alone
        given, seen = len(window), text
    text = decode(window)
    if text.startswith(seen):
        yield text[len(seen) :]


def _is_byte(token: str | None) -> bool:
    return token is not None and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
