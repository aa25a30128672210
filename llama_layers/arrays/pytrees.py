"""Classes that hold arrays, as trees of jax: `jax.jit`, `grad`, `vmap` and `scan` take them.

jax has to know such a class before it meets one, and nobody is to import jax for it. So a class
waits until jax is loaded, and the first array of jax comes or a model is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

C = TypeVar("C", bound=type)

# Marks fields that belong to the structure of the tree, as numbers and words do; the others are
# arrays, or trees of them.
STATIC = {"static": True}


class Tree(NamedTuple):
    """How a class is split into the parts that jax may change, by name, and all else."""

    cls: type
    split: Callable[[Any], tuple[dict[str, Any], Any]]
    join: Callable[[dict[str, Any], Any], Any]


_waiting: list[Tree] = []


def traceable(cls: C) -> C:
    """Make a dataclass a tree of its fields."""
    static = [f.name for f in fields(cls) if f.metadata.get("static")]
    parts = [f.name for f in fields(cls) if f.name not in static]

    def split(value: Any) -> tuple[dict[str, Any], Any]:
        return {n: getattr(value, n) for n in parts}, tuple(getattr(value, n) for n in static)

    def join(arrays: dict[str, Any], numbers: Iterable[Any]) -> Any:
        return unchecked(cls, **arrays, **dict(zip(static, numbers, strict=True)))

    offer(Tree(cls, split, join))
    return cls


def unchecked(cls: type, /, **attributes: Any) -> Any:
    """Make a value without its `__init__`: jax puts other things than arrays into its trees."""
    value: Any = object.__new__(cls)
    vars(value).update(attributes)
    return value


def offer(tree: Tree) -> None:
    """Let jax know a class, now or when it is loaded."""
    _waiting.append(tree)
    offer_to_jax()


def offer_to_jax() -> None:
    """Let jax know the classes that wait, if the program has loaded it."""
    while _waiting and "jax" in sys.modules:
        _register(_waiting.pop())


def _register(tree: Tree) -> None:
    import jax

    def flatten(value: Any) -> tuple[Any, Any]:
        parts, others = tree.split(value)
        return tuple(parts.values()), (tuple(parts), others)

    def flatten_with_keys(value: Any) -> tuple[Any, Any]:
        parts, others = tree.split(value)
        keyed = tuple((jax.tree_util.GetAttrKey(name), part) for name, part in parts.items())
        return keyed, (tuple(parts), others)

    def unflatten(structure: tuple[tuple[str, ...], Any], parts: Iterable[Any]) -> Any:
        names, others = structure
        return tree.join(dict(zip(names, parts, strict=True)), others)

    jax.tree_util.register_pytree_with_keys(tree.cls, flatten_with_keys, unflatten, flatten)
