"""An exact result, and how far a computed one can lie from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.brief import brief
from llama_layers.arrays.dtypes import float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.verify.roundoff import Float64Array


@dataclass(frozen=True)
class Bound:
    """An exact result, and how far from it a computed one can be.

    Attributes
    ----------
    exact : ndarray of float64
        The operation in float64, on the numbers as they were stored.
    limit : ndarray of float64
        No correct computation errs by more: beyond it is a FAIL. Infinite where nothing can be
        said: the computation can overflow, or a sum of many products in few bits can lose all of
        them.
    usual : ndarray of float64
        Correct computations stay within it in practice, since rounding errors cancel (N. Higham
        and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
        Comput. 41, 2019): beyond it is a WARN.
    """

    exact: Float64Array
    limit: Float64Array
    usual: Float64Array

    def __repr__(self) -> str:
        return brief(self)

    def ratio(self, computed: Array, /) -> Float64Array:
        """The error of each element over its limit.

        Parameters
        ----------
        computed : Array, the shape of `exact`
            The result to judge, of any library and float dtype.

        Returns
        -------
        ndarray of float64
            At most 1 where the result can be correct; 0 where it is exact, infinite where it is
            not a number and should be, and where it differs though rounding has no part in it.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        return _error_over(self.limit, self.exact, computed)

    def usual_ratio(self, computed: Array, /) -> Float64Array:
        """The error of each element over what is usual; see `ratio`.

        Parameters
        ----------
        computed : Array, the shape of `exact`
            The result to judge.

        Returns
        -------
        ndarray of float64
            Above 1 where the result deserves a second look.
        """
        return _error_over(self.usual, self.exact, computed)

    def only(self, places: NDArray[np.bool_], /) -> Bound:
        """The bound for some elements; the others may be anything.

        Parameters
        ----------
        places : ndarray of bool, broadcastable to the shape of `exact`
            True for the elements that are judged.

        Returns
        -------
        Bound
            With no limit elsewhere.
        """
        return replace(
            self,
            limit=np.where(places, self.limit, np.inf),
            usual=np.where(places, self.usual, np.inf),
        )


def _error_over(limit: Float64Array, exact: Float64Array, computed: Array) -> Float64Array:
    float_format("computed", computed)
    values = to_numpy(computed).astype(np.float64)
    if values.shape != exact.shape:
        raise ValueError(f"computed: expected shape {list(exact.shape)}, got {list(values.shape)}")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(values - exact)
        ratio = np.asarray(error / limit)
        ratio[error == 0] = 0.0
        if np.isfinite(error.sum()):  # so that every number is finite
            return ratio
    same = (values == exact) | (np.isnan(values) & np.isnan(exact))
    ratio[~same & ~(np.isfinite(values) & np.isfinite(exact))] = np.inf
    ratio[same | np.isinf(limit)] = 0.0
    return ratio
