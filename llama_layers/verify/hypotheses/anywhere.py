"""Mistakes that any site can have, read off the port's own array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.bounds import Bound
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Float64Array,
    Formula,
    Hypothesis,
    Kind,
    Moved,
    wide,
)
from llama_layers.verify.operations import Formats, Operation
from llama_layers.verify.sites import sites
from llama_layers.verify.stored import info_of


def _another_sites_array(operation: Any, failing: FailingSite) -> Iterator[Change]:
    computed = failing.computed
    for site in sites(failing.recorded.config):
        if site.name == failing.site.name or site.name not in failing.recorded.arrays:
            continue
        if info_of(failing.recorded.arrays, site.name).shape == computed.shape:
            other = failing.recorded.array(site.name)
            same = other.ravel()[:8].tobytes() == computed.ravel()[:8].tobytes()
            if same and np.array_equal(other, computed):  # which NaN never are
                yield Change(
                    Formula(wide(other), np.zeros(other.shape), 0),
                    f"The port has the array of {site.name} here, bit for bit.",
                )


@dataclass(frozen=True, eq=False)
class _With:
    """An operation whose result has other numbers in some places."""

    operation: Computable
    places: NDArray[np.bool_]
    numbers: Float64Array

    def bound(self, formats: Formats) -> Bound:
        """The operation's bound, which allows those numbers alone there."""
        bound = self.operation.bound(formats)
        exact = np.where(self.places, self.numbers, bound.exact)
        limit, usual = (np.where(self.places, 0.0, y) for y in (bound.limit, bound.usual))
        return Bound(exact, limit, usual)


def _begins(operation: Any, failing: FailingSite) -> Iterator[Change]:
    """NaN, infinity, or both, where finite numbers give finite ones."""
    bound, computed = failing.bound(failing.formats), wide(failing.computed)
    odd = ~np.isfinite(computed) & (bound.ratio(computed) > 1)
    names = [
        name for name, is_so in (("NaN", np.isnan), ("Inf", np.isinf)) if is_so(computed[odd]).any()
    ]
    if names and np.isfinite(bound.exact[odd]).all():
        yield Change(
            _With(failing, odd, computed),
            f"{' and '.join(names)} begins here{_where(odd)}: what the port was given makes "
            "finite numbers.",
        )


def _zeros(operation: Any, failing: FailingSite) -> Iterator[Change]:
    bound = failing.bound(failing.formats)
    wrong = bound.ratio(failing.computed) > 1
    if wrong.any() and not wide(failing.computed)[wrong].any():
        yield Change(
            Moved(failing, lambda y: np.where(wrong, 0.0, y)),
            f"The port has zeros{_where(wrong)} that should be other numbers.",
        )


def _where(wrong: NDArray[np.bool_]) -> str:
    """Along which axes the places are few."""
    names = {3: ("sequence", "token", "channel"), 4: ("sequence", "token", "head", "channel")}
    said = []
    for axis, name in enumerate(names[wrong.ndim]):
        others = tuple(i for i in range(wrong.ndim) if i != axis)
        places = np.flatnonzero(wrong.any(axis=others))
        if 0 < len(places) < wrong.shape[axis]:
            numbers = ", ".join(map(str, places[:4])) + (" ..." if len(places) > 4 else "")
            said.append(f"{name} {numbers}")
    return f" at {', '.join(said)}" if said else ""


def _scaled(operation: Any, failing: FailingSite) -> Iterator[Change]:
    exact, computed = failing.bound(failing.formats).exact, wide(failing.computed)
    both = np.isfinite(exact) & np.isfinite(computed)
    size = float(np.sum(np.square(exact[both])))
    factor = float(np.sum(computed[both] * exact[both])) / size if size else 0.0
    if factor:
        yield Change(
            Moved(failing, lambda y: factor * y),
            f"The port has {factor:.6g} times what it should have, everywhere.",
        )


def _tokens_moved(operation: Any, failing: FailingSite) -> Iterator[Change]:
    if failing.site.pairwise:
        return
    count = failing.computed.shape[1]
    for step, which in ((1, "before"), (-1, "after")):
        if count > 1:
            yield Change(
                Moved(failing, partial(np.roll, shift=step, axis=1)),
                f"The port has at each token what belongs to the one {which} it.",
            )
    yield Change(Moved(failing, lambda y: y[:, ::-1]), "The port has the tokens in reverse order.")
    if len(failing.computed) > 1:
        yield Change(
            Moved(failing, lambda y: y[::-1]), "The port has the sequences in reverse order."
        )


def _heads_moved(operation: Any, failing: FailingSite) -> Iterator[Change]:
    """For each head the one whose numbers it has."""
    exact, computed = failing.bound(failing.formats).exact, wide(failing.computed)
    if failing.site.pairwise:
        return
    config = failing.recorded.config
    if exact.ndim == 3:
        if "self_attn" not in failing.site.role or failing.site.role == "self_attn.o_proj":
            return
        exact, computed = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in (exact, computed))
    heads = exact.shape[2]
    errors = [
        [np.sum(np.square(computed[:, :, to] - exact[:, :, of])) for of in range(heads)]
        for to in range(heads)
    ]
    order = np.argmin(np.nan_to_num(errors, nan=np.inf), axis=1)
    if (order == np.arange(heads)).all():
        return
    shape = failing.computed.shape
    split = (*shape[:2], heads, -1)
    yield Change(
        Moved(failing, lambda y: y.reshape(split)[:, :, order].reshape(shape)),
        f"The port has heads {_listed(order)} in the place of {_listed(np.arange(heads))}.",
    )


def _listed(numbers: NDArray[Any]) -> str:
    return ", ".join(map(str, numbers[:6])) + (" ..." if len(numbers) > 6 else "")


HYPOTHESES = (
    Hypothesis("array of another site", Operation, _another_sites_array, kind=Kind.SOLVED),
    Hypothesis("NaN or Inf begins here", Operation, _begins, kind=Kind.SOLVED),
    Hypothesis("zeros", Operation, _zeros, kind=Kind.SOLVED),
    Hypothesis("everything scaled", Operation, _scaled, kind=Kind.SOLVED),
    Hypothesis("tokens in another place", Operation, _tokens_moved, kind=Kind.SOLVED),
    Hypothesis("heads in another order", Operation, _heads_moved, kind=Kind.SOLVED),
)
