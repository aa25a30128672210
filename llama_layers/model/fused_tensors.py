"""Tensors that files hold as one: queries, keys and values, or gate and up, below each other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, TypeVar

from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import CheckpointError
from llama_layers.layers.tensors import Names
from llama_layers.model.tensor_names import expected_tensors

# Modules of a layer, and those whose rows they have.
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


_T = TypeVar("_T", bound=_Shaped)


def unfused(
    tensors: Mapping[str, _T],
    config: LlamaConfig,
    modules: Collection[str],
    cut: Callable[[_T, str, int, int], _T],
) -> dict[str, _T]:
    """The tensors by Hugging Face name, with those of some fused modules in their parts.

    ``cut(tensor, name, start, stop)`` gives some rows of one. Raises CheckpointError if it does not
    have the rows of its parts, or a part is there beside it.
    """
    shapes = expected_tensors(config)
    found: dict[str, _T] = {}
    for name, tensor in tensors.items():
        if not (parts := parts_of(name, modules)) or not all(part in shapes for part in parts):
            found[name] = tensor
            continue
        if there := [part for part in parts if part in tensors]:
            raise CheckpointError(f"{name}: expected no {there[0]} beside it")
        rows = [shapes[part][0] for part in parts]
        expected = [sum(rows), *shapes[parts[0]][1:]]
        if list(tensor.shape) != expected:
            raise CheckpointError(
                f"{name}: expected shape {expected}, the rows of {', '.join(parts)}, "
                f"got {list(tensor.shape)}"
            )
        stop = 0
        for part, count in zip(parts, rows, strict=True):
            start, stop = stop, stop + count
            found[part] = cut(tensor, part, start, stop)
    return found


def tensors_in_files(config: LlamaConfig) -> dict[str, Names]:
    """The tensors of a family's files by name, each with the `expected_tensors` that it holds."""
    modules = FAMILIES[config.model_type].fused
    fused = {part: module for module in modules for part in FUSED[module]}
    found: dict[str, Names] = {}
    for name in expected_tensors(config):
        before, layer, module, kind = _split(name)
        stored = f"{before}{layer}{fused[module]}.{kind}" if module in fused else name
        found[stored] = (*found.get(stored, ()), name)
    return found


def parts_of(name: str, modules: Collection[str]) -> Names:
    """The tensors whose rows a tensor of that name has, if it is fused."""
    before, layer, module, kind = _split(name)
    if module not in modules or module not in FUSED:
        return ()
    return tuple(f"{before}{layer}{part}.{kind}" for part in FUSED[module])


def _split(name: str) -> tuple[str, str, str, str]:
    """``model.layers.``, ``3.``, ``mlp.up_proj`` and ``weight``; no layer outside of layers."""
    below, _, kind = name.rpartition(".")
    before = "model.layers."
    if not below.startswith(before):
        return "", "", below, kind
    number, _, module = below.removeprefix(before).partition(".")
    return before, f"{number}.", module, kind
