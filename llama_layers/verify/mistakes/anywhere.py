"""Mistakes that any site can have, read off the port's own array."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.layers.sites import Site, sites
from llama_layers.verify.bound import Bound
from llama_layers.verify.build import operation_of
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.fit import FLAT, ROTATED
from llama_layers.verify.judge import judge
from llama_layers.verify.localised import counted_as
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, mistake, moved
from llama_layers.verify.operations import Attention, Copy, Logprobs, Norm, Operation, Rope
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.report.wording import listed
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.stored import info_of

# Elements in which flipped bits are looked for, and how many limits these must be off.
_FLIPPED, _TOLD = 4, 64.0


@mistake(Operation, "array of another site", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
    """The port has the array of {0} here{1}, bit for bit."""
    wrong = np.asarray((at.ratio > 1).any(axis=-1))
    if not wrong.any():
        wrong = np.ones_like(wrong)
    theirs = at.computed[wrong]
    for site in sites(at.config):
        if site.name == at.site.name or site.name not in at.recorded.arrays:
            continue
        if site.layer == at.site.layer and {site.role, at.site.role} <= set(FLAT):
            continue  # projections with each other's weights, which have a name of their own
        if info_of(at.recorded.arrays, site.name).shape != at.computed.shape:
            continue
        other = at.recorded.array(site.name)
        # NaN are never equal.
        same = np.array_equal(other[wrong][:1], theirs[:1]) and theirs.any()
        if not same or not np.array_equal(other[wrong], theirs):
            continue
        whole = np.array_equal(other, at.computed)
        if whole and _follows(site, at):
            continue
        more = "" if whole else f" in {len(theirs)} of {wrong.size} rows"
        yield Computed(partial(_with, at, wide(other), wrong[..., None])), site.name, more


def _follows(site: Site, at: FailingSite) -> bool:
    """Whether another site is right as computed from the same array: its sum absorbs the rest."""
    route = at.recorded.route(site)
    if route is None or not any(_is_same(name, at) for name in route):
        return False
    operation = operation_of(site, route, at.recorded, at.model)
    array = at.recorded.array(site.name)
    return judge(array, operation.bound(at.formats)).verdict != "FAIL"


def _is_same(name: str, at: FailingSite) -> bool:
    return name == at.site.name or np.array_equal(at.recorded.array(name), at.computed)


def _with(at: FailingSite, numbers: Float64Array, places: np.ndarray, how: Rounding) -> Bound:
    """The right numbers but at some places, where others are, which are not off."""
    right = at.bound(how)
    limits = (np.where(places, 0.0, y) for y in (right.limit, right.usual))
    return Bound(np.where(places, numbers, right.exact), *limits)


@mistake(Operation, "sign flipped", parts=True)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Has the numbers with the other sign."""
    if isinstance(operation, Logprobs):  # where that has a name of its own
        return None
    return moved(at, np.negative)


@mistake(Operation, "a corrupted element", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Has at {0} numbers of which a bit is flipped, or the exponent is another."""
    right = at.bound(at.formats)
    wrong = at.ratio > 1
    places = np.argwhere(wrong)
    if not 0 < len(places) <= _FLIPPED:
        return None
    theirs, exact, limit = at.computed[wrong], right.exact[wrong], right.limit[wrong]
    width = theirs.dtype.itemsize * 8
    unsigned = np.dtype(f"u{theirs.dtype.itemsize}")
    flips = theirs.view(unsigned) ^ (unsigned.type(1) << np.arange(width, dtype=unsigned)[:, None])
    with np.errstate(all="ignore"):
        back = np.abs(wide(flips.astype(unsigned).view(theirs.dtype)) - exact)
        powers = np.exp2(np.rint(np.log2(np.abs(wide(theirs) / exact))))
        off = np.abs(np.abs(wide(theirs)) / powers - np.abs(exact))
    explained = (back.min(axis=0) <= limit) | (off <= limit)
    # By chance some bit nearly undoes an error that is not much larger than the limit.
    if not explained.all() or (np.abs(wide(theirs) - exact) < _TOLD * limit).any():
        return None
    said = " and ".join(str([int(i) for i in place]) for place in places[:3])
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return Computed(partial(_with, at, wide(at.computed), wrong)), said + more


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
    """The port has {0:.6g} times what it should have, everywhere{1}."""
    exact, computed = at.bound(at.formats).exact, wide(at.computed)
    both = np.isfinite(exact) & np.isfinite(computed)
    size = float(np.sum(np.square(exact[both])))
    factor = float(np.sum(computed[both] * exact[both])) / size if size else 0.0
    if not factor:
        return None
    return _times(at, np.asarray(factor)), factor, _scale_of_scores(at, factor)


def _times(at: FailingSite, factor: Float64Array) -> Computed:
    """The right result times factors, rounded once more."""

    def bound(how: Rounding) -> Bound:
        right = at.bound(how)
        exact = factor * right.exact
        rounding = 2 * FLOATS[how.dtype].unit_roundoff * np.abs(exact)
        limits = (abs(factor) * y + rounding for y in (right.limit, right.usual))
        return Bound(exact, *limits)

    return Computed(bound)


@mistake(Norm | Rope | Attention | Copy, "a head scaled", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """The port has {0:.6g} times what it should have in {1}."""
    if at.ratio.ndim != 4:
        return None  # norms of no heads
    wrong = np.flatnonzero((at.ratio > 1).any(axis=(0, 1, 3)))
    if not 0 < len(wrong) < at.ratio.shape[2]:
        return None
    exact, computed = at.bound(at.formats).exact[:, :, wrong], wide(at.computed)[:, :, wrong]
    if not np.isfinite(computed).all():
        return None
    factors = np.ones(at.ratio.shape[2])
    factors[wrong] = factor = float(np.sum(computed * exact) / np.sum(np.square(exact)))
    return _times(at, factors[:, None]), factor, counted_as("head", wrong)


def _scale_of_scores(at: FailingSite, factor: float) -> str:
    """A remark where a factor of queries or keys is one that scores are scaled with."""
    if at.site.role not in ROTATED:
        return ""
    root = at.config.head_dim**0.5
    scales = {1 / root: "1 / sqrt(D)", root: "sqrt(D)", root**-0.5: "the root of 1 / sqrt(D)"}
    scales |= {y / math.log(2): f"log2(e) times {said}" for y, said in scales.items()}
    said = next((said for y, said in scales.items() if math.isclose(y, factor, rel_tol=1e-4)), "")
    return f", which is {said}: only scores are scaled" if said else ""


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


@mistake(Operation, "heads repeated", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """The port has heads {0} instead of {1}."""
    return _in_order(at, twice=True)


@mistake(Operation, "heads in another order", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """The port has heads {0} instead of {1}."""
    return _in_order(at, twice=False)


def _in_order(at: FailingSite, *, twice: bool) -> Changed | None:
    """The heads that the port has: some of them `twice`, or each once."""
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
    if (order == np.arange(heads)).all() or (len({*order}) < heads) is not twice:
        return None
    shape = at.computed.shape
    found = moved(at, lambda y: y.reshape(*shape[:2], heads, -1)[:, :, order].reshape(shape))
    return found, listed(order.tolist(), 6), listed(range(heads), 6)
