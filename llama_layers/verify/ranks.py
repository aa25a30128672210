"""The bounds of sums whose parts several ranks compute, and add in a stated format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llama_layers.arrays.dtypes import FLOATS, FloatFormat, dtype_name
from llama_layers.verify.profiles import PARALLEL, Rounding, RoundingProfile, profile_named
from llama_layers.verify.roundoff import Float64Array, compounded, gamma


def parallel_profile(metadata: Mapping[str, str]) -> RoundingProfile | None:
    """The ranks that a trace says it is of; None if it says nothing of them."""
    said = metadata.get("tensor_parallel")
    return None if said is None else profile_named(f"{PARALLEL}{said}")


@dataclass(frozen=True)
class Ranks:
    r"""Ranks that each compute a part of a sum, and add their parts in a format of their own.

    In a part each product takes part in at most n roundings, however the n products are split.
    Then p parts are rounded to the format of the reduce, with roundoff :math:`u_r`, and each
    takes part in at most p - 1 of the roundings of their additions, in any order (Higham, section
    4.2). So each product is multiplied with :math:`(1 + \theta_n)(1 + \theta^{(r)}_p)`, and

    .. math:: |\hat y - y| \le \bigl((1 + \gamma_n)(1 + \gamma^{(r)}_p) - 1\bigr) A
        + 2 p \eta_r .

    Where the format of the reduce holds that of the sums, parts are not rounded, and p is p - 1. A
    bias may be one term more of either sum. A single rank adds nothing.
    """

    roundings: int
    """How many each product meets in the reduce."""
    form: FloatFormat
    """That of the reduce."""
    lost: float
    """What parts and their sums lose where they underflow."""

    @classmethod
    def of(cls, how: Rounding, biased: bool) -> Ranks | None:
        """The ranks of a profile; None for one."""
        count, form = how.profile.ranks, FLOATS[how.profile.reduce or how.accumulate]
        if count == 1:
            return None
        tiny = form.smallest_normal if how.profile.flushes else form.smallest_subnormal
        return cls(count - form.holds(how.sums) + biased, form, 2 * count * tiny)

    def grown(self, error: float, grow: Callable[[int, float], float]) -> float:
        """The relative error of a product after the reduce."""
        return compounded(error, grow(self.roundings, self.form.unit_roundoff))


@dataclass(frozen=True, eq=False)
class AddedParts:
    """Partial sums that were recorded before ranks added them."""

    size: Float64Array
    """The sum of their magnitudes."""
    count: int
    form: FloatFormat
    """That of the recorded arrays, to which their sum was rounded."""

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray]) -> AddedParts:
        """The parts that ranks recorded."""
        size = sum(np.abs(array.astype(np.float64)) for array in arrays)
        return cls(np.asarray(size), len(arrays), FLOATS[dtype_name(arrays[0].dtype)])

    def off(self, how: Rounding) -> Float64Array:
        """How far their sum can be from what ranks that added them in any order went on with.

        They did so in the dtype of the arrays, or in a narrower format that the profile states.
        """
        stated = FLOATS[how.profile.reduce or self.form.name]
        form = min(self.form, stated, key=lambda form: form.precision)
        error = gamma(self.count + 1, form.unit_roundoff) * self.size
        error = error + 2 * self.count * form.smallest_subnormal
        return np.where(self.size + error < form.max, error, np.inf)
