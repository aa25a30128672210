"""Deep copies of values that hold arrays."""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
from array_api_compat import is_jax_array

from llama_layers.arrays.namespaces import is_tensor
from llama_layers.arrays.pytrees import unchecked
from llama_layers.arrays.types import Array


class DeepCopied:
    """A base of classes whose deep copies hold copies of all arrays.

    torch refuses to copy tensors that it computed and records for a gradient: their copies are
    detached.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Self = unchecked(type(self), **deep_copied(self.__getstate__(), memo))
        return copied


def deep_copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of an array, or of anything in tuples, lists and dicts."""
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(deep_copied(item, memo) for item in value)
    if kind is dict:
        return {name: deep_copied(item, memo) for name, item in value.items()}
    if is_tensor(value) and not value.is_leaf:
        memo[id(value)] = value.detach().clone()
    return copy.deepcopy(value, memo)


def may_change(array: Array) -> bool:
    """Whether one can write to an array, as far as its library tells."""
    if isinstance(array, np.ndarray):
        return bool(array.flags.writeable)
    return not is_jax_array(array)
