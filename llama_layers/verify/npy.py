"""The header of an .npy file, read without running or unpickling anything.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np

_MAGIC = b"\x93NUMPY"
# NumPy's own limit. A header of one array of numbers has some 80 bytes.
_LONGEST = 10_000
# The blanks of Python, whose text a header is: without the vertical tab, which \s matches, too.
_BLANKS = " \t\n\r\f"
_ENTRY = re.compile(
    r"""\s* (['"]) (?P<key>descr|fortran_order|shape) \1 \s*:\s*
    (?: (['"]) (?P<text>[^'"]*) \3 | (?P<bool>True|False) | \( (?P<sizes>[\d\s,L]*) \) )
    \s* (?:,|$)""",
    re.VERBOSE | re.ASCII,
)
# Numbers, and the two bytes without meaning that NumPy makes of the bfloat16 of ml_dtypes.
_DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|V2)")
_SIZE = re.compile(r"\s*(0|[1-9]\d{0,18})L?\s*", re.ASCII)


@dataclass(frozen=True)
class Header:
    """The content of an .npy file's header."""

    dtype: np.dtype  # in the byte order of the file
    shape: tuple[int, ...]
    order: Literal["C", "F"]  # whether the last or the first axis is contiguous
    start: int  # where the numbers begin in the file

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(opened: IO[bytes]) -> Header:
    """Read the header of an .npy file open at its start; a ValueError says what is wrong."""
    start = opened.read(10)
    if not start:
        raise ValueError("got an empty file")
    if len(start) < 10 or not start.startswith(_MAGIC):
        raise ValueError("got a file that does not begin as an .npy file")
    version, length = start[6], int.from_bytes(start[8:10], "little")
    if version not in (1, 2, 3) or start[7]:
        raise ValueError(
            f"expected version 1.0, 2.0 or 3.0 of the format, got {version}.{start[7]}"
        )
    beyond = 10
    if version > 1:
        length += int.from_bytes(opened.read(2), "little") << 16
        beyond = 12
    if length > _LONGEST:
        raise ValueError(f"expected a header of at most {_LONGEST} bytes, got {length}")
    text = opened.read(length)
    if len(text) < length:
        raise ValueError("got a file that is cut off in its header")
    entries = _entries(text.decode("latin1"))
    return Header(
        _dtype(entries["descr"]),
        _shape(entries["shape"]),
        "F" if entries["fortran_order"] == "True" else "C",
        beyond + length,
    )


def _entries(text: str) -> dict[str, str]:
    """Return the three entries of a header, which is the text of a Python dict."""
    text = text.strip(_BLANKS)
    rest = text[1:-1]
    found: dict[str, str] = {}
    while rest.strip(_BLANKS) and (entry := _ENTRY.match(rest)) is not None:
        key = entry["key"]
        kind = {"descr": "text", "fortran_order": "bool", "shape": "sizes"}[key]
        if entry[kind] is None or key in found:
            break
        found[key] = entry[kind]
        rest = rest[entry.end() :]
    whole = text.startswith("{") and text.endswith("}") and not rest.strip(_BLANKS)
    if not whole or len(found) < 3 or "\v" in text:
        raise ValueError(f"expected descr, fortran_order and shape in the header, got {text!r}")
    return found


def _dtype(descr: str) -> np.dtype:
    if not _DTYPE.fullmatch(descr):
        raise ValueError(f"expected numbers, got descr {descr!r}")
    try:
        return np.dtype(descr)
    except TypeError:  # wider than this machine has
        raise ValueError(f"expected numbers, got descr {descr!r}") from None


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) == 1 and text.strip():
        raise ValueError(f"expected a shape, got ({text})")  # a number in brackets is not a tuple
    sizes = [_SIZE.fullmatch(part) for part in (parts if parts[-1].strip() else parts[:-1])]
    if not all(sizes) or len(sizes) > 8:
        raise ValueError(f"expected a shape, got ({text})")
    return tuple(int(size[1]) for size in sizes if size is not None)
