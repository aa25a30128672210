"""Mistakes that any site can have, read off the port's own array."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from llama_layers.layers.sites import sites
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.fit import FLAT
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake, moved
from llama_layers.verify.operations import Operation
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.report.wording import listed
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.stored import info_of


@mistake(Operation, "array of another site", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
    """The port has the array of {0} here, bit for bit."""
    for site in sites(at.config):
        if site.name == at.site.name or site.name not in at.recorded.arrays:
            continue
        if site.layer == at.site.layer and {site.role, at.site.role} <= set(FLAT):
            continue  # projections with each other's weights, which have a name of their own
        if info_of(at.recorded.arrays, site.name).shape == at.computed.shape:
            other = at.recorded.array(site.name)
            same = other.ravel()[:8].tobytes() == at.computed.ravel()[:8].tobytes()
            if same and np.array_equal(other, at.computed):  # which NaN never are
                yield Computed(partial(_just, wide(other))), site.name


def _just(numbers: Float64Array, how: Rounding) -> Bound:
    """Numbers that are not off."""
    return Bound(numbers, np.zeros(numbers.shape), np.zeros(numbers.shape))


@mistake(Operation, "NaN or Inf begins here", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """{0} {1} here: the port's inputs give finite numbers."""
    right, computed = at.bound(at.formats), wide(at.computed)
    odd = ~np.isfinite(computed) & (right.ratio(computed) > 1)
    names = [
        name for name, is_so in (("NaN", np.isnan), ("Inf", np.isinf)) if is_so(computed[odd]).any()
    ]
    if not names or not np.isfinite(right.exact[odd]).all():
        return None

    def bound(how: Rounding) -> Bound:
        right = at.bound(how)
        limits = (np.where(odd, 0.0, y) for y in (right.limit, right.usual))
        return Bound(np.where(odd, computed, right.exact), *limits)

    begin = "begins" if len(names) == 1 else "begin"
    return Computed(bound), " and ".join(names), begin


@mistake(Operation, "zeros", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """The port has zeros that should be other numbers."""
    wrong = at.bound(at.formats).ratio(at.computed) > 1
    if not wrong.any() or wide(at.computed)[wrong].any():
        return None
    return moved(at, lambda y: np.where(wrong, 0.0, y))


@mistake(Operation, "everything scaled", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """The port has {0:.6g} times what it should have, everywhere."""
    exact, computed = at.bound(at.formats).exact, wide(at.computed)
    both = np.isfinite(exact) & np.isfinite(computed)
    size = float(np.sum(np.square(exact[both])))
    factor = float(np.sum(computed[both] * exact[both])) / size if size else 0.0
    return (moved(at, lambda y: factor * y), factor) if factor else None


@mistake(Operation, "tokens in another place", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
    """The port has {0}."""
    if at.site.pairwise:
        return
    if at.computed.shape[1] > 1:
        for step, which in ((1, "before"), (-1, "after")):
            said = f"at each token what belongs to the one {which} it"
            yield moved(at, partial(np.roll, shift=step, axis=1)), said
    yield moved(at, lambda y: y[:, ::-1]), "the tokens in reverse order"


@mistake(Operation, "heads in another order", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """The port has heads {0} instead of {1}."""
    # For each head the one whose numbers it has.
    exact, computed = at.bound(at.formats).exact, wide(at.computed)
    flat = exact.ndim == 3
    if at.site.pairwise or (flat and at.site.role not in FLAT):
        return None
    if flat:
        exact, computed = (
            y.reshape(*y.shape[:2], -1, at.config.head_dim) for y in (exact, computed)
        )
    heads = exact.shape[2]
    errors = [
        [np.sum(np.square(computed[:, :, to] - exact[:, :, of])) for of in range(heads)]
        for to in range(heads)
    ]
    order = np.argmin(np.nan_to_num(errors, nan=np.inf), axis=1)
    if (order == np.arange(heads)).all():
        return None
    shape = at.computed.shape
    found = moved(at, lambda y: y.reshape(*shape[:2], heads, -1)[:, :, order].reshape(shape))
    return found, listed(order.tolist(), 6), listed(range(heads), 6)
