"""Arrays whose shapes and dtypes are known before their numbers are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.types import Array
from llama_layers.errors import TraceError

# Arrays of a trace that are not activations.
TOKENS = ("input_ids", "positions", "attention_mask", "next_ids")


class ArrayInfo(NamedTuple):
    """The shape and the dtype of an array."""

    shape: tuple[int, ...]
    dtype: str


class StoredArray(NamedTuple):
    """An array that is read when it is used; its shape and dtype are known before.

    One in a file is pickled as the place of the file and its name there.
    """

    info: Callable[[], ArrayInfo]
    read: Callable[[], Array]

    def changed(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> StoredArray:
        """Return the array as a function changes it, to another shape, when it is read."""
        info = ArrayInfo(shape, self.info().dtype)
        return StoredArray(partial(_same, info), partial(_changed, self.read, change))


def _same(info: ArrayInfo) -> ArrayInfo:
    return info


def _changed(read: Callable[[], Array], change: Callable[[Array], Array]) -> Array:
    return change(read())


class StoredArrays(Mapping[str, Array]):
    """Arrays by name, each read when it is used."""

    def __init__(self, stored: Mapping[str, StoredArray]) -> None:
        self.stored = stored

    def __reduce__(self) -> tuple[object, ...]:
        return dict, ({name: self[name] for name in self},)  # their files may be gone by then

    def __getitem__(self, name: str) -> Array:
        return self.stored[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.stored  # without reading the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def stored(arrays: Mapping[str, Array], name: str) -> StoredArray:
    """Return one of some arrays, to be read when it is used, without the others."""
    if isinstance(arrays, StoredArrays):
        return arrays.stored[name]
    one = {name: arrays[name]} if isinstance(arrays, dict) else arrays
    return StoredArray(partial(info_of, one, name), partial(one.__getitem__, name))


def info_of(arrays: Mapping[str, Array], name: str) -> ArrayInfo:
    """Return the shape and the dtype of an array; raise TraceError if it is something else."""
    if isinstance(arrays, StoredArrays):
        return arrays.stored[name].info()
    array = arrays[name]
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TraceError(f"{name}: expected an array, got {type(array).__name__}")
    return ArrayInfo(tuple(int(size) for size in array.shape), dtype_name(array.dtype))
