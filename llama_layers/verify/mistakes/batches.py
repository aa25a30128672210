"""Sequences of a batch in each other's places, and dropout, read off the port's own array."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.registry import Changed, Kind, evaluated, mistake, moved
from llama_layers.verify.operations import (
    Attention,
    Embedding,
    Gate,
    Linear,
    Norm,
    Operation,
    Residual,
    Rope,
    WeightedSum,
)
from llama_layers.verify.report.wording import listed
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

# Sequences that are looked for in each other's places, and tokens of them.
_SEQUENCES, _TOKENS = 32, 8
# Elements below which a share of zeros says nothing, and how near to one factor the others lie.
_ELEMENTS, _NEAR = 64, 0.02
_DROPPED = Linear | Norm | Rope | Gate | Attention | WeightedSum | Embedding


@mistake(Operation, "sequences of the batch repeated", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Has sequences {0} of the batch instead of {1}."""
    return _moved(at, twice=True)


@mistake(Operation, "sequences in another order", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Has sequences {0} of the batch instead of {1}."""
    return _moved(at, twice=False)


def _moved(at: FailingSite, *, twice: bool) -> Changed | None:
    """The sequences that the port has: some of them `twice`, or each once."""
    exact, computed = at.bound(at.formats).exact, wide(at.computed)
    return _found(at, exact, computed, twice) if 1 < len(exact) <= _SEQUENCES else None


def _found(
    at: FailingSite, exact: Float64Array, computed: Float64Array, twice: bool
) -> Changed | None:
    few = np.s_[:, :, :_TOKENS] if at.site.pairwise else np.s_[:, :_TOKENS]
    rows, theirs = (np.nan_to_num(y[few].reshape(len(y), -1)) for y in (exact, computed))
    errors = np.stack([np.sum(np.square(rows - row), axis=-1) for row in theirs])
    order = errors.argmin(axis=1)
    own = np.arange(len(rows))
    if (order == own).all() or (len({*order.tolist()}) < len(own)) is not twice:
        return None
    return moved(at, lambda y: y[order]), listed(order.tolist(), 6), listed(own.tolist(), 6)


def _dropped(share_of: Float64Array, places: NDArray[np.bool_]) -> float | None:
    """The factor of the elements that are not dropped, if they look like dropout.

    The factor is one for all, and predicts the share of zeros: 1 / (1 - p).
    """
    shares = share_of[places]
    if shares.size < _ELEMENTS:
        return None
    zero = np.abs(shares) < _NEAR
    if not 0 < np.count_nonzero(zero) < shares.size:
        return None
    factor = float(np.median(shares[~zero]))
    alike = np.mean(np.abs(shares[~zero] - factor) < _NEAR * max(factor, 1.0))
    if factor <= 1 or alike < 0.95:
        return None
    p = 1 - 1 / factor
    spread = np.sqrt(p * (1 - p) / shares.size)
    if abs(np.mean(zero) - p) > 5 * spread:
        return None
    return factor


_SAYS = "Drops a share of {0:.3g} of the elements, as in training; it should drop none."


@mistake(_DROPPED, "dropout", kind=Kind.SOLVED, says=_SAYS)
def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
    if at.site.pairwise:
        return
    exact, computed = at.bound(at.formats).exact, wide(at.computed)
    told = np.abs(exact) > 0.1 * np.sqrt(np.mean(np.square(exact)))
    found = _dropped(computed / np.where(told, exact, 1.0), told)
    zero = computed == 0
    for factor in () if found is None else _alike(found):
        yield moved(at, _scaled, zero, factor), 1 - 1 / factor


@mistake(Residual, "dropout", kind=Kind.SOLVED, says=_SAYS)
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    x, added, computed = wide(residual.x), wide(residual.added), wide(at.computed)
    told = np.abs(added) > 0.1 * np.sqrt(np.mean(np.square(added)))
    found = _dropped((computed - x) / np.where(told, added, 1.0), told)
    for factor in () if found is None else _alike(found):
        zero = np.abs(computed - x) < np.abs(computed - (x + factor * added))

        def formula(r: Residual[Tracked], by: float = factor, zero: Any = zero) -> Tracked:
            return r.x + (r.added * by).where(~zero, 0.0)

        yield evaluated(residual, formula), 1 - 1 / factor


def _scaled(y: Float64Array, zero: NDArray[np.bool_], factor: float) -> Float64Array:
    return np.where(zero, 0.0, y * factor)


def _alike(factor: float) -> Iterator[float]:
    """The factor, and those of shares of few digits if it is as near to them as can be told."""
    yield factor
    share = 1 - 1 / factor
    for digits in (1, 2, 3):
        kept = 1 - round(share, digits)
        if abs(kept * factor - 1) < 1e-4:
            yield from dict.fromkeys((1 / kept, 1 / float(np.float32(kept))))
            return
