"""Ways in which an array's numbers can lie in memory."""

from __future__ import annotations

import numpy as np


def _unaligned(array: np.ndarray) -> np.ndarray:
    """A byte after a multiple of their size."""
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    odd = memory.view(np.dtype([("numbers", array.dtype)]))["numbers"].reshape(array.shape)
    odd[...] = array
    return odd


def _apart(array: np.ndarray, step: int = 2) -> np.ndarray:
    """Every axis in steps."""
    size = abs(step)
    memory = np.zeros([n * size for n in array.shape], array.dtype)
    there = memory[(..., *[slice(None, None, step)] * array.ndim)]
    there[...] = array
    return there


def _in_records(array: np.ndarray) -> np.ndarray:
    """Five bytes, or more, from number to number."""
    records = np.zeros(array.shape, np.dtype([("tag", np.uint8), ("number", array.dtype)]))
    records["number"] = array
    return records["number"]


def _read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def _mapped(array: np.ndarray) -> np.ndarray:
    """Of the class that NumPy has for files."""
    return array.copy().view(np.memmap)


LAYOUTS = {
    "in the other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": _unaligned,
    "unaligned, in the other byte order": lambda a: _unaligned(a.astype(a.dtype.newbyteorder())),
    "in records": _in_records,
    "apart": _apart,
    "backwards": lambda a: _apart(a, -1),
    "apart and backwards": lambda a: _apart(a, -2),
    "columns first": np.asfortranarray,
    "read-only": _read_only,
    "mapped": _mapped,
}
