"""The ranks among which a layer's weights are split: the one place where layers communicate."""

from __future__ import annotations

import zlib
from typing import Any, Protocol, TypeVar, runtime_checkable

from llama_layers.arrays.dtypes import accumulate_format, dtype_of, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import ArrayT
from llama_layers.layers.mask import Mask

T = TypeVar("T")


@runtime_checkable
class Group(Protocol):
    """Processes that hold parts of one model; each of them is a rank."""

    @property
    def rank(self) -> int:
        """Which of the ranks this is, from 0 on."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, array: ArrayT, /) -> ArrayT:
        """Sum the arrays of all ranks, float32 or float64; every rank gets the sum."""

    def broadcast(self, value: T, /) -> T:
        """Give the value of rank 0, which may be any object, to every rank."""

    def gather(self, value: T, /) -> list[T]:
        """Give every rank the values of all ranks, in their order."""


def reduce_partial(y: ArrayT, group: Group | None) -> ArrayT:
    """Sum partial products over the ranks of a group; without a group y is whole already.

    Numbers narrower than float32 are added in float32, and the sum is rounded once.
    """
    if group is None:
        return y
    xp = namespace(y=y)
    wide = dtype_of(xp, accumulate_format(float_format("y", y)).name)
    return xp.astype(group.all_reduce(xp.astype(y, wide, copy=False)), y.dtype, copy=False)


def check_shared(group: Group | None, **arguments: object) -> None:
    """Raise ValueError on every rank unless all have the same arguments.

    From different ones they would compute a mixture, and of different shapes they could not.
    """
    if group is None:
        return
    first, *others = group.gather({name: _digest(value) for name, value in arguments.items()})
    for name in arguments:
        for rank, found in enumerate(others, start=1):
            if found[name] != first[name]:
                raise ValueError(
                    f"{name}: expected the same on every rank, got others on rank {rank}"
                )


def _digest(value: object) -> object:
    """What tells an array, or None, from others, in few bytes."""
    if isinstance(value, Mask):
        return [_digest(part) for part in vars(value).values()]
    if not hasattr(value, "dtype"):
        return value
    given: Any = value
    array = to_numpy(given)
    return str(array.dtype), array.shape, zlib.crc32(array.tobytes())
