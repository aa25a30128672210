"""Memory for results that is used again, since new pages cost more than writing to them.

A prefill of 512 tokens of SmolLM2 makes some 800 arrays of one to three MiB. If each of them comes
as new pages, which the operating system has to clear, a thread takes 15 % longer.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
from numpy.typing import DTypeLike, NDArray

LINE = 64  # bytes: each array begins at a multiple
SMALLEST = 1 << 17  # bytes: for less the C library keeps memory itself
LARGEST = 1 << 22  # bytes: for more NumPy asks for huge pages
SPARE = 8  # blocks of one size that are kept: at most 63 MiB of all sizes

_spare: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)


class _Block:
    """Memory that goes back when the last array that is a view of it is gone."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self, spare: dict[int, list[NDArray[np.uint8]]] = _spare) -> None:
        if len(blocks := spare[self._memory.size]) < SPARE:
            blocks.append(self._memory)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Like ``numpy.empty``."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    if not SMALLEST <= nbytes <= LARGEST:
        return np.empty(shape, kind)
    size = 1 << (nbytes - 1).bit_length()  # pages that nobody writes to take no memory
    try:
        memory = _spare[size].pop()
    except IndexError:
        memory = _aligned(size)
    return np.asarray(_Block(memory))[:nbytes].view(kind).reshape(shape)


def _aligned(size: int) -> NDArray[np.uint8]:
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size]
