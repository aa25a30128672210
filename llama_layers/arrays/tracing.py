"""Numbers that are not known yet, while `jax.jit` or `torch.compile` compiles.

Where a result depends on them it must be an array; where a check does it is left out.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import is_jax_array

from llama_layers.arrays.namespaces import is_tensor
from llama_layers.arrays.types import Array


def is_traced(value: object) -> bool:
    """Whether a value is an array without numbers, for which a compiler compiles."""
    if isinstance(value, bool | int):
        return False
    if is_tensor(value):
        import torch

        return torch.compiler.is_compiling()
    if not is_jax_array(value):
        return False
    import jax

    return isinstance(value, jax.core.Tracer)


def is_recorded(array: Any) -> bool:
    """Whether torch records what is computed of an array, for its gradient."""
    return is_tensor(array) and bool(array.requires_grad)


def known(value: int | Array) -> int | None:
    """An integer, or an array of one, as Python's; None if it has no number yet."""
    return None if is_traced(value) else int(value)


def known_false(condition: bool | Array) -> bool:
    """Whether a bool, or an array of one, is false for certain."""
    return not is_traced(condition) and not bool(condition)
