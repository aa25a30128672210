"""The processor that numba compiles for: this one, or the one that its environment names."""

from __future__ import annotations

from numba.core.registry import cpu_target


def missing(*features: str) -> str | None:
    """The first of some features, named as LLVM does, that the processor does not have."""
    there = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return next((feature for feature in features if f"+{feature}" not in there), None)
