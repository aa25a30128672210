"""A computed result held against its bound: PASS, WARN or FAIL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llama_layers.verify.bounds import Bound

Verdict = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Judgement:
    """What a bound says of a whole array.

    Attributes
    ----------
    ratio : float
        The largest error over its limit; above 1 no rounding explains it.
    usual_ratio : float
        The largest error over what is usual.
    index : tuple of int
        The element with the largest ratio.
    """

    ratio: float
    usual_ratio: float
    index: tuple[int, ...]

    @property
    def verdict(self) -> Verdict:
        """FAIL beyond the limit, WARN beyond what is usual, PASS otherwise."""
        if self.ratio > 1:
            return "FAIL"
        return "WARN" if self.usual_ratio > 1 else "PASS"


def judge(computed: Any, bound: Bound, /) -> Judgement:
    """Hold every element of a result against its bound.

    Parameters
    ----------
    computed : Array, the shape of ``bound.exact``
        The result, of any library and float dtype.
    bound : Bound
        What it should be, and how far from that it may lie.

    Returns
    -------
    Judgement
        Of the worst element; an empty array passes.

    Raises
    ------
    TypeError
        If `computed` holds no floats.
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
    ratio, usual = bound.ratio(computed), bound.usual_ratio(computed)
    if not ratio.size:
        return Judgement(0.0, 0.0, ())
    index = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Judgement(float(ratio.max()), float(usual.max()), tuple(int(i) for i in index))
