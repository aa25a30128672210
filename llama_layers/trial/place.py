"""Where a body is tried, and the outcome."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llama_layers.arrays.dispatch import Function
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import Array, Namespace
from llama_layers.verify.bound import Bound


class Outcome(NamedTuple):
    """How a body did in one case."""

    label: str
    ratio: float
    """Its largest error over the limit; infinite for another fault."""
    problem: str | None = None
    """The fault, if it is not the size of an error."""


@dataclass(frozen=True)
class Place:
    """The library whose arrays a body takes, on its current device."""

    xp: Namespace

    @staticmethod
    def of(library: str) -> Place:
        """NumPy, or CuPy on the GPU that it uses now."""
        if library == "numpy":
            return Place(np)
        return Place(namespace(like=importlib.import_module(library).empty(0)))

    @property
    def single_products(self) -> bool:
        """Whether float32 products have all their digits, which TF32 takes away where asked to."""
        return self.xp is np or os.environ.get("CUPY_TF32") != "1"

    def array(self, numbers: np.ndarray) -> Array:
        """The numbers in memory of their own, in C order."""
        return from_numpy(numbers.copy(), self.xp)


class Case(NamedTuple):
    """Small inputs of an operation."""

    label: str
    arrays: tuple[np.ndarray, ...]
    arguments: Callable[..., tuple[object, ...]]
    """The arguments of a body, after the namespace, from the arrays where it is tried."""
    bound: Callable[[], Bound]


def outcome(body: Function, definition: Function, case: Case, place: Place) -> Outcome | None:
    """How far a body is off; None if it does not take the case.

    Where the definition's result is finite the body's has to be within the bound, and where it is
    not the body's may not be either. The inputs have to be unchanged.
    """
    arrays = [place.array(a) for a in case.arrays]
    arguments = case.arguments(*arrays)
    result = body(place.xp, *arguments)
    if result is NotImplemented:
        return None
    result = to_numpy(result)
    expected = definition(np, *case.arguments(*case.arrays))
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return Outcome(
            case.label,
            math.inf,
            f"it gives {result.dtype.name} {list(result.shape)} and not "
            f"{expected.dtype.name} {list(expected.shape)} ({case.label})",
        )
    if not all(
        to_numpy(now).tobytes() == before.tobytes()
        for now, before in zip(arrays, case.arrays, strict=True)
    ):
        return Outcome(case.label, math.inf, f"it changes its inputs ({case.label})")
    if not np.array_equal(np.isfinite(result), np.isfinite(expected)):
        return Outcome(
            case.label, math.inf, f"NaN or infinity is not where it should be ({case.label})"
        )
    return Outcome(case.label, float(case.bound().ratio(result).max(initial=0.0)))
