"""Whether contestants do the same work: a quick look, and no check by bounds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama_layers.bench.contestants.contestant import Contestant
from llama_layers.errors import BackendError

# Of the norm of the result. Other work, a matrix transposed, say, is off by about 1.4; a model
# of many layers in 16-bit formats by some 0.05.
TOLERANCES = {"float32": 1e-2, "bfloat16": 0.3, "float16": 0.3}


def check_agreement(contestants: Sequence[Contestant], sizes: Sequence[int], dtype: str) -> None:
    """Run each contestant once, which warms it up, and refuse results far from the first one's.

    Parameters
    ----------
    contestants : sequence of Contestant
        All are held against the first.
    sizes : sequence of int
        The cases.
    dtype : str
        Of the weights.

    Raises
    ------
    BackendError
        If a contestant's result is another, or not finite.
    """
    for size in sizes:
        first = None
        for contestant in contestants:
            result = contestant.to_numpy(contestant.prepare(size)())
            numbers = np.asarray(result, np.float64).ravel()
            if first is None:
                first = numbers
            same_size = numbers.size == first.size
            off = np.linalg.norm(numbers - first) / np.linalg.norm(first) if same_size else np.inf
            if not off <= TOLERANCES[dtype]:
                raise BackendError(
                    f"{contestant.name}: does other work at size {size}: expected the result of "
                    f"{contestants[0].name} within {TOLERANCES[dtype]:g}, got {off:.2g} off"
                )
