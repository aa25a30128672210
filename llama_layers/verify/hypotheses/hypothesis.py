"""What a hypothesis is, and operations that only a mistake would compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from types import UnionType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.bounds import Bound, gamma
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.operations import Formats

Float64Array = NDArray[np.float64]
# What a profile may do that is no rounding of a step.
_NO_ROUNDINGS = ("flushes", "excess_precision")


class Kind(IntEnum):
    """What a hypothesis is about; one kind is tried after the other, until one explains."""

    MISTAKE = 0
    """Another formula, another weight, another input."""
    ROUNDING = 1
    """The right formula in fewer bits."""
    SOLVED = 2
    """Something about the mistake is found from the port's own array."""


class Change(NamedTuple):
    """An operation with a mistake."""

    operation: Computable
    """What the port would have computed."""
    detail: str
    """A sentence: what it seems to do, and what it should."""


@dataclass(frozen=True)
class Hypothesis:
    """A mistake that a port may have made.

    Attributes
    ----------
    name : str
        A few words.
    operations : type or union of types
        The operations in which it can be made.
    changes : callable
        ``changes(operation, failing)`` gives the operations that it may have led to, each alone or
        with a detail of its own.
    detail : str
        A sentence: what the port seems to do, and what it should.
    kind : Kind
        What it is about.
    loosens : bool
        Whether it allows larger errors around the same result, not another result; the port's
        array must show it in another way, then.
    common : bool
        Whether it is tried in all operations at once, too, where inputs were not recorded.
    """

    name: str
    operations: type | UnionType
    changes: Callable[[Any, FailingSite], Iterable[Computable | Change]]
    detail: str = ""
    kind: Kind = Kind.MISTAKE
    loosens: bool = False
    common: bool = False

    def applied(self, failing: FailingSite) -> Iterable[Change]:
        """The operations with the mistake; none where it could not have been made."""
        if not isinstance(failing.operation, self.operations):
            return
        for change in self.changes(failing.operation, failing):
            yield change if isinstance(change, Change) else Change(change, self.detail)


@dataclass(frozen=True, eq=False)
class Moved:
    """The result of an operation with its elements in other places, or scaled."""

    operation: Computable
    move: Callable[[Float64Array], Float64Array]

    def bound(self, formats: Formats) -> Bound:
        """The bound of the operation, moved as its result is."""
        bound = self.operation.bound(formats)
        limit, usual = (np.abs(self.move(part)) for part in (bound.limit, bound.usual))
        return Bound(self.move(bound.exact), limit, usual)


@dataclass(frozen=True, eq=False)
class Only:
    """An operation of which some elements can be anything."""

    operation: Computable
    places: NDArray[np.bool_]

    def bound(self, formats: Formats) -> Bound:
        """The operation's bound at the other places."""
        return self.operation.bound(formats).only(self.places)


@dataclass(frozen=True, eq=False)
class Formula:
    r"""A result that no function of this package computes.

    Each of `roundings` rounding errors is relative to `magnitude`, of the size of the terms that
    the result is summed from: :math:`|\hat y - y| \le \gamma_n A + u_o |y|`. A profile may round
    some steps to the format of the result, and what is read from a cache, if something is `cached`;
    inputs that had more digits count as as many roundings.
    """

    exact: Float64Array
    magnitude: Float64Array
    roundings: int
    cached: bool = False

    def bound(self, formats: Formats) -> Bound:
        """The exact result, and what so many roundings allow."""
        out, sums = FLOATS[formats.dtype], FLOATS[formats.accumulate]
        growth = gamma(2 * self.roundings, sums.unit_roundoff)
        profile = formats.profile
        further = {k: v for k, v in vars(profile).items() if k not in _NO_ROUNDINGS}
        if any(value is True for value in further.values()):
            growth += 4 * out.unit_roundoff
        if formats.unrounded_inputs is not None:
            growth += 4 * FLOATS[formats.unrounded_inputs].unit_roundoff
        if self.cached and profile.kv_cache is not None:
            growth += 4 * FLOATS[profile.kv_cache].unit_roundoff
        with np.errstate(invalid="ignore", over="ignore"):
            limit = growth * self.magnitude + out.unit_roundoff * np.abs(self.exact)
            limit += out.smallest_subnormal
            if profile.flushes:
                limit += sums.smallest_normal
            limit = np.where(np.abs(self.exact) + limit >= out.max, np.inf, limit)
        return Bound(self.exact, limit, limit)


def wide(array: Any) -> Float64Array:
    """An array's numbers in float64."""
    return to_numpy(array).astype(np.float64)


def with_fields(operation: Any, **fields: Any) -> Any:
    """A copy of an operation with other fields, those that it has."""
    return replace(operation, **{k: v for k, v in fields.items() if hasattr(operation, k)})


COMMON = (
    "RoPE layout interleaved",
    "RoPE permutation left in",
    "RoPE turned the other way",
    "RoPE not applied",
    "another scale of scores",
    "key heads tiled",
    "block not added",
    "gelu for silu",
    "gelu (tanh) for silu",
    "gate and up swapped in the product",
    "embedding scaled by the root of hidden_size",
    "another rope_theta",
    "RoPE scaling ignored",
    "another eps",
    "another window",
    "norm weight skipped",
    "norm weight plus one",
    "keys and values swapped",
    "bias missing",
    "no causal mask",
)
