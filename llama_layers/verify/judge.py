"""A computed result held against its bound: PASS, WARN or FAIL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from llama_layers.arrays.types import Array
from llama_layers.verify.bound import Bound

Verdict = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Judgement:
    """The verdict of a bound on a whole array.

    Attributes
    ----------
    ratio : float
        The largest error over its limit; above 1 no rounding explains it.
    usual_ratio : float
        The largest error over what is usual.
    index : tuple of int
        The element with the largest ratio.
    unjudged : int
        How many elements have no limit, neither a strict nor a usual one, since the computation
        can overflow.
    of : int
        How many elements there are.
    """

    ratio: float
    usual_ratio: float
    index: tuple[int, ...]
    unjudged: int
    of: int

    @property
    def verdict(self) -> Verdict:
        """FAIL beyond the limit; WARN beyond what is usual, or if nothing could be judged; PASS."""
        if self.ratio > 1:
            return "FAIL"
        nothing_judged = self.of > 0 and self.unjudged == self.of
        return "WARN" if self.usual_ratio > 1 or nothing_judged else "PASS"


def judge(computed: Array, bound: Bound, /) -> Judgement:
    """Hold every element of a result against its bound.

    Parameters
    ----------
    computed : Array, the shape of ``bound.exact``
        The result, of any library and float dtype.
    bound : Bound
        The exact result, and how far from it the computed one may lie.

    Returns
    -------
    Judgement
        Of the worst element; an empty array passes.

    Raises
    ------
    TypeError
        If `computed` holds no floats, or `bound` is not a Bound.
    ValueError
        If the shapes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers.verify import judge, linear_bound
    >>> x, w = np.ones((1, 4), np.float32), np.eye(4, dtype=np.float32)
    >>> judge(x, linear_bound(x, w)).verdict
    'PASS'
    >>> judge(x * 1.001, linear_bound(x, w)).verdict
    'FAIL'
    """
    if not isinstance(bound, Bound):
        raise TypeError(f"bound: expected a Bound, got {type(bound).__name__}")
    ratio, usual = bound.ratio(computed), bound.usual_ratio(computed)
    if not ratio.size:
        return Judgement(0.0, 0.0, (), unjudged=0, of=0)
    index = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Judgement(
        float(ratio.max()),
        float(usual.max()),
        tuple(int(i) for i in index),
        unjudged=int(np.count_nonzero(np.isinf(bound.limit) & np.isinf(bound.usual))),
        of=ratio.size,
    )
