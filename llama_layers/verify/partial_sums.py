"""Sites that ranks add up: recorded before, as partial sums, or after, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.verify.distance import distance
from llama_layers.verify.stored import StoredArray

# Arrays of two ranks that are closer than this are the same sum twice, and not parts of it.
_SAME = 0.1


def looks_added(sites: Iterable[Sequence[StoredArray]]) -> bool:
    """Return whether two ranks have the same sum at one of some sites, but for roundings.

    Each of the sites has an array of each rank. A port records them all before the reduce, or all
    after it.
    """
    for of_ranks in sites:
        wide = (to_numpy(array.read()).astype(np.float64) for array in of_ranks)
        if any(a.any() and distance(a, b) < _SAME for a, b in combinations(list(wide), 2)):
            return True
    return False


def summed(of_ranks: Sequence[StoredArray]) -> StoredArray:
    """Return the sum of partial sums, rounded to their dtype."""
    reads = tuple(array.read for array in of_ranks)
    return of_ranks[0].changed(of_ranks[0].info().shape, partial(_sum, reads))


def _sum(reads: Sequence[Callable[[], Array]], first: Array) -> np.ndarray:
    """The sum of all ranks' arrays, rounded to their dtype."""
    total = sum(to_numpy(read()).astype(np.float64) for read in reads)
    with np.errstate(over="ignore"):
        return np.asarray(total).astype(to_numpy(first).dtype)
