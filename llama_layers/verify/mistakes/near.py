"""A look at a little of a site, before a mistake is tried on all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.attention import Heads, OverHeads
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.registry import Computed, evaluated
from llama_layers.verify.operations import Linear, Operation
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

FLOAT64 = Rounding("float64", "float64")
More = TypeVarTuple("More")

# A mistake leaves less than that share of the error that it explains.
_LESS = 0.9
# How many of the worst tokens, and of the worst outputs of a product, are looked at.
_TOKENS, _OUTPUTS = 2, 16


def worst_tokens(at: FailingSite, count: int = _TOKENS) -> NDArray[np.intp]:
    """The tokens with the largest errors, in order."""
    token = _token_axis(at)
    others = tuple(i for i in range(at.ratio.ndim) if i != token)
    return np.sort(np.argsort(-at.ratio.max(axis=others), kind="stable")[:count])


def _token_axis(at: FailingSite) -> int:
    return 2 if at.site.pairwise else 1


def is_near(at: FailingSite, exact: Float64Array, places: Any = ...) -> bool:
    """Whether what is wrong errs less from a mistaken result at some places than from the right.

    Where nothing is wrong, everything is near.
    """
    wrong = at.ratio[places] > 1
    columns = wrong.any(axis=tuple(range(wrong.ndim - 1)), keepdims=True)
    rows = wrong.any(axis=-1, keepdims=True) & columns
    if not rows.any():
        return True
    theirs, right = wide(at.computed[places])[rows], at.bound(at.formats).exact[places][rows]
    with np.errstate(all="ignore"):
        errors = [np.nansum(np.square(theirs - y)) for y in (np.asarray(exact)[rows], right)]
    return bool(errors[0] < _LESS**2 * errors[1])


def worst_alone(at: FailingSite) -> tuple[Operation, tuple[slice, ...]] | None:
    """A product at the worst element, or attention of its query, and where that is in the array.

    None of other operations, which are computed soon.
    """
    operation, worst = at.operation, np.unravel_index(np.argmax(at.ratio), at.ratio.shape)
    here = tuple(slice(i, i + 1) for i in worst)
    if isinstance(operation, Linear):
        b, s, n = here
        bias = None if operation.bias is None else operation.bias[n]
        weight = operation.weight[n]
        return replace(operation, x=operation.x[b, s], weight=weight, bias=bias), here
    if isinstance(operation, OverHeads):
        token = _token_axis(at)
        row = tuple(place if i == token else slice(None) for i, place in enumerate(here))
        queries = np.arange(at.ratio.shape[token])[row[token]]
        few = operation.at_tokens(queries)
        return None if few is None else (few, row)
    return None


def weighed(
    operation: OverHeads,
    at: FailingSite,
    formula: Callable[[Heads, *More], Tracked],
    *more: *More,
) -> Computed | None:
    """Attention with a wrong formula; None if the worst queries are not explained by it."""
    if not at.computed.any():  # nothing to look at
        return evaluated(operation, formula, *more)
    queries = worst_tokens(at)
    places = np.s_[:, :, queries] if at.site.pairwise else np.s_[:, queries]
    few = operation.at_tokens(queries)
    assert few is not None
    with np.errstate(all="ignore"):
        exact = few.evaluate(lambda heads: formula(heads, *more), FLOAT64).exact
    return evaluated(operation, formula, *more) if is_near(at, exact, places) else None


def other_inputs(operation: OverHeads, at: FailingSite, **fields: Any) -> OverHeads | None:
    """Attention with other keys, values or another mask.

    None if that does not explain the worst queries, or if most that another mask is for are right.
    """
    changed = replace(operation, **fields)
    if "mask" in fields and (at.ratio > 1).any():
        other = (np.asarray(vars(operation)["mask"]) != fields["mask"]).any(axis=(0, -1))
        axes = (0, 1, 3) if at.site.pairwise else (0, 2, 3)
        wrong = (at.ratio > 1).any(axis=axes)
        if 2 * np.count_nonzero(wrong & other) < np.count_nonzero(other):
            return None
    return changed if weighed(changed, at, type(operation).formula) is not None else None


def worst_of_product(
    at: FailingSite, count: int = _OUTPUTS
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The worst tokens of a product, and the outputs with the largest errors there."""
    tokens = worst_tokens(at)
    worst = at.ratio[:, tokens].max(axis=(0, 1))
    count = min(count, int(np.count_nonzero(worst > 1)) or count)
    return tokens, np.sort(np.argsort(-worst, kind="stable")[:count])


def other_weight(linear: Linear, at: FailingSite) -> bool:
    """Whether a product with another matrix or input explains the worst of a site."""
    _, outputs = worst_of_product(at)
    bias = None if linear.bias is None else linear.bias[outputs]
    few = replace(linear, weight=linear.weight[outputs], bias=bias)
    return explains_outputs(few, at, outputs)


def explains_outputs(few: Linear, at: FailingSite, outputs: NDArray[np.intp]) -> bool:
    """Whether the outputs that a product gives explain those of a site, in the worst tokens."""
    tokens = worst_tokens(at)
    bias = 0.0 if few.bias is None else wide(few.bias)
    exact = wide(few.x[:, tokens]) @ wide(few.weight).T + bias
    return is_near(at, exact, np.ix_(np.arange(len(few.x)), tokens, outputs))
