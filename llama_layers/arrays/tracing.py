"""Numbers that are not known yet, while `jax.jit` compiles.

Where a result depends on them it must be an array; where a check does it is left out.
"""

from __future__ import annotations

from array_api_compat import is_jax_array

from llama_layers.arrays.types import Array


def is_traced(value: object) -> bool:
    """Whether a value is an array without numbers, for which `jax.jit` compiles."""
    if not is_jax_array(value):
        return False
    import jax

    return isinstance(value, jax.core.Tracer)


def known(value: int | Array) -> int | None:
    """An integer, or an array of one, as Python's; None if it has no number yet."""
    return None if is_traced(value) else int(value)


def known_false(condition: bool | Array) -> bool:
    """Whether a bool, or an array of one, is false for certain."""
    return not is_traced(condition) and not bool(condition)
