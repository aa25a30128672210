"""Exceptions that tell files from arguments."""

from __future__ import annotations

import re

_LONGEST_NAME, _LONGEST_MESSAGE = 200, 2000
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONG_NAME = re.compile(rf"[^\s/]{{{_LONGEST_NAME + 1},}}")


def one_line(text: str) -> str:
    """Make text from a file safe to show: on one line, and not longer than a reader can use.

    Control characters are escaped, so that no file can move a terminal's cursor or write a line
    of its own. Names longer than 200 characters and texts longer than 2000 are cut in the middle.
    """
    text = escaped(text)
    text = _LONG_NAME.sub(lambda found: _cut(found[0], _LONGEST_NAME), text)
    return _cut(text, _LONGEST_MESSAGE)


def escaped(text: str) -> str:
    """Text from a file with its control characters written as in Python."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def shown(value: object) -> str:
    """The repr of a value for a message: on one line, and not longer than a reader can use."""
    try:
        return one_line(repr(value))
    except ValueError:  # Python does not write out an integer of thousands of digits
        if isinstance(value, int):
            return f"an integer of {value.bit_length()} bits"
        return f"a {type(value).__name__} that cannot be shown"
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"


def _cut(text: str, length: int) -> str:
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


class _FileError(ValueError):
    """An error about a file's content, which may be quoted in the message."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(_FileError):
    """A config that is incomplete, contradicts itself, or asks for something not implemented."""


class CheckpointError(_FileError):
    """A checkpoint that is malformed, incomplete, or does not fit its config."""


class BackendError(RuntimeError):
    """An array library that was asked for and cannot compute here; the message says why."""


class TraceError(_FileError):
    """A trace that is malformed, incomplete, or does not fit the model it is compared with."""
