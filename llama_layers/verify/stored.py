"""Arrays whose shapes and dtypes are known before their numbers are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.errors import TraceError


class ArrayInfo(NamedTuple):
    """What is known of an array without its numbers."""

    shape: tuple[int, ...]
    dtype: str


class StoredArrays(Mapping[str, Any]):
    """Arrays by name, each read when it is used."""

    @abstractmethod
    def info(self, name: str) -> ArrayInfo:
        """The shape and the dtype of an array, which is not read."""


class Without(StoredArrays):
    """Stored arrays but for some."""

    def __init__(self, arrays: StoredArrays, names: Collection[str]) -> None:
        self._arrays = arrays
        self._names = {name: None for name in arrays if name not in names}

    def info(self, name: str) -> ArrayInfo:
        """The shape and the dtype of an array, which is not read."""
        return self._arrays.info(name)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def info_of(arrays: Mapping[str, Any], name: str) -> ArrayInfo:
    """The shape and the dtype of an array; a TraceError if it is something else."""
    if isinstance(arrays, StoredArrays):
        return arrays.info(name)
    array = arrays[name]
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TraceError(f"{name}: expected an array, got {type(array).__name__}")
    return ArrayInfo(tuple(int(size) for size in array.shape), dtype_name(array.dtype))
