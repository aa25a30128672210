"""One body on all cases of its operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from llama_layers.arrays.dispatch import Function
from llama_layers.backends.numba.sizes import of_any_size
from llama_layers.backends.trial_results import TrialResult
from llama_layers.backends.trust import Body
from llama_layers.trial import decoding, operations
from llama_layers.trial.place import Outcome, Place

OPERATIONS: dict[str, Callable[[Function, Place], Iterator[Outcome]]] = {
    "activations": operations.activations,
    "attend": operations.attend,
    "decoder_layers": decoding.decoder_layers,
    "decode_loop": decoding.decode_loop,
    "gate_with_silu": operations.gate_with_silu,
    "linear_2d": operations.linear_2d,
    "normalise": operations.normalise,
    "rotate": operations.rotate,
}


def try_body(body: Body) -> TrialResult:
    """Try a body on work of any size, and say how its errors compare with their limits.

    Parameters
    ----------
    body : Body
        The body, and whose arrays it takes.

    Returns
    -------
    TrialResult
        With the largest error over its limit, or the first that is beyond it. Errors that the body
        raises are left to the caller.
    """
    worst = Outcome("", -math.inf)
    with np.errstate(all="ignore"), of_any_size():  # some inputs overflow on purpose
        for seen in OPERATIONS[body.name](body.function, Place.of(body.library)):
            if not seen.ratio <= worst.ratio:  # NaN is the worst
                worst = seen
            if not worst.ratio <= 1:
                break
    if worst.ratio == -math.inf:
        return TrialResult(None, "it takes none of the inputs that it would be tried on")
    problem = None
    if not worst.ratio <= 1:
        by = f"{worst.ratio:.3g} times the limit" if worst.ratio < math.inf else "no number"
        problem = worst.problem or f"its error is {by} ({worst.label})"
    return TrialResult(worst.ratio if math.isfinite(worst.ratio) else None, problem)
