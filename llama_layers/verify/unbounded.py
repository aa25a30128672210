"""A site whose inputs were not recorded: no bound holds, but it can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.sites import LOGPROBS, Site
from llama_layers.model.llama import Llama
from llama_layers.verify.bound import Bound
from llama_layers.verify.distance import distance
from llama_layers.verify.place import Place, place_of
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.recompute import Recomputation
from llama_layers.verify.validate import Recorded

# Such a site may differ from the exact array this many times as much as our own run does.
CLOSE = 30.0
# Where every result is rounded to few bits, other orders of sums and other formulas matter less.
CLOSE_NARROW = 10.0
# Log-probabilities of enough tokens may do so this many times: transformers differs by 0.9 to 1.15
# times what our own run does, in each dtype. The error of few tokens may be small by chance.
CLOSE_LOGPROBS, ENOUGH = 6.0, 16
# Elements are wrong that differ this many times as much as our own run does at their token; some do
# wherever the whole array differs by more than is allowed, since it is less than that / sqrt(2).
_WRONG = 2 / 3


@dataclass(frozen=True, eq=False)
class Unbounded:
    """How far an array is from a recomputation through sites that were not recorded.

    Attributes
    ----------
    site : Site
        Which.
    array : ndarray
        What the port has there.
    formats : Rounding
        In which formats it computes.
    inputs : tuple of str
        The recorded sites that it was recomputed from.
    difference : float
        Relative, of the whole array; NaN where nothing was recorded to recompute it from.
    yardstick : float or None
        The same of our own run in the port's dtype.
    odd : bool
        Whether it has NaN or Inf that nothing recorded and no weight accounts for.
    lacks_ids : bool
        Whether it could be recomputed if `input_ids` were recorded.
    place : Place or None
        Where the wrong elements are, if it differs.
    """

    site: Site
    array: np.ndarray
    formats: Rounding
    inputs: tuple[str, ...]
    difference: float
    yardstick: float | None
    odd: bool = False
    lacks_ids: bool = False
    place: Place | None = None

    @property
    def allowed(self) -> float:
        """The largest difference that looks like rounding."""
        floor = FLOATS[self.formats.dtype].unit_roundoff
        close = _close(self.formats.dtype)
        if self.site.name == LOGPROBS and (~np.isnan(self.array[..., 0])).sum() >= ENOUGH:
            close = CLOSE_LOGPROBS
        return close * max(self.yardstick or 0.0, floor)

    @property
    def verdict(self) -> Literal["SEEN", "DIFFERS"]:
        """DIFFERS if the difference is larger."""
        if math.isnan(self.difference):
            return "DIFFERS" if self.odd else "SEEN"
        return "SEEN" if self.difference <= self.allowed else "DIFFERS"

    @property
    def note(self) -> str:
        """What this rests on, as a sentence."""
        if not math.isnan(self.difference):
            return (
                "inputs were not recorded, so that only inherited error could be seen, for which "
                "no bound holds"
            )
        if self.odd:
            return "the port has NaN or Inf here, and nothing that it could come from was recorded"
        if self.lacks_ids:
            return "input_ids were not recorded, and it could be recomputed from nothing else"
        return "nothing that it could be recomputed from was recorded"


class Recomputed:
    """The sites of a trace whose inputs were not recorded."""

    def __init__(self, recorded: Recorded, model: Llama) -> None:
        self._recorded = recorded
        self._model = model
        self.exact = Recomputation(recorded, model)
        self._own: dict[str, Recomputation] = {}

    def compared(self, site: Site, array: np.ndarray, formats: Rounding) -> Unbounded:
        """Compare a site with its recomputation. Ask for sites in the order of a forward pass."""
        if not self.exact.knows(site):
            odd = not _is_finite(self._recorded, site, array) and _weights_are_finite(
                self._model, site
            )
            lacks_ids = self._recorded.input_ids is None
            found = Unbounded(site, array, formats, (), math.nan, None, odd, lacks_ids)
            finite = np.where(np.isfinite(array), array, 0).astype(np.float64)
            return self._placed(found, finite, finite)
        walks = (self.exact, self.walk(formats.dtype))
        exact, ours = (walk.array(site)[:, -array.shape[1] :] for walk in walks)
        seen = counts(self._recorded, site, array.shape) if site.pairwise else None
        own = distance(exact, ours, seen)
        far = _apart(self._recorded, array, exact, seen)
        found = Unbounded(site, array, formats, self.exact.gap(site).sources, far, own)
        return self._placed(found, exact, ours)

    def walk(self, dtype: str) -> Recomputation:
        """The recomputation in a dtype."""
        if dtype == "float64":
            return self.exact
        if dtype not in self._own:
            self._own[dtype] = Recomputation(self._recorded, self._model, dtype)
        return self._own[dtype]

    def _placed(self, found: Unbounded, exact: np.ndarray, ours: np.ndarray) -> Unbounded:
        """Say where an array differs, if it does."""
        if found.verdict != "DIFFERS" or found.site.name == LOGPROBS:
            return found  # the report says which tokens' log-probabilities differ most
        bound = _as_our_own(exact, ours, found.formats.dtype)
        bound = bound.only(counts(self._recorded, found.site, found.array.shape))
        return replace(found, place=place_of(found.site, found.array, bound, self._model.config))


def _close(dtype: str) -> float:
    narrow = FLOATS[dtype].precision < FLOATS["float32"].precision
    return CLOSE_NARROW if narrow else CLOSE


def _as_our_own(exact: np.ndarray, ours: np.ndarray, dtype: str) -> Bound:
    """What our own run's errors let expect, in each row; no bound on rounding."""
    errors = own_errors(exact, ours, FLOATS[dtype].unit_roundoff)
    limit = np.broadcast_to(_WRONG * _close(dtype) * errors, exact.shape)
    return Bound(exact.astype(np.float64), limit, limit)


def own_errors(exact: np.ndarray, ours: np.ndarray, roundoff: float) -> np.ndarray:
    """The size of our own run's errors in each row, and at least that of one rounding.

    Rows of one number are taken together.
    """
    exact, ours = exact.astype(np.float64), ours.astype(np.float64)
    if exact.shape[-1] == 1:
        exact, ours = exact.reshape(1, -1), ours.reshape(1, -1)
        error = np.maximum(_size(ours - exact), roundoff * _size(exact))
        return error[..., None]
    return np.maximum(_size(ours - exact), roundoff * _size(exact))


def _size(array: np.ndarray) -> np.ndarray:
    """The root mean square over the last axis of what is finite."""
    finite = np.where(np.isfinite(array), array, 0.0)
    with np.errstate(over="ignore"):  # what hides keys is huge
        return np.asarray(np.sqrt(np.mean(np.square(finite), axis=-1, keepdims=True)))


def _apart(
    recorded: Recorded, array: np.ndarray, exact: np.ndarray, seen: NDArray[np.bool_] | None
) -> float:
    """How far apart two arrays are at tokens that are not padding, or at pairs that are seen."""
    if recorded.keep is None or seen is not None:
        return distance(exact, array, seen)
    keep = recorded.keep[:, -array.shape[1] :]
    return distance(exact[keep], array[keep])


def _is_finite(recorded: Recorded, site: Site, array: np.ndarray) -> bool:
    """Whether each number that counts is finite."""
    finite = np.isfinite(array.astype(np.float64))
    return bool(finite[counts(recorded, site, array.shape)].all())


def counts(recorded: Recorded, site: Site, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which numbers of a site depend on no padding and no hidden key."""
    counts = np.ones(shape, bool)
    if site.pairwise:
        assert site.layer is not None  # pairs are of a layer's tokens
        counts &= recorded.allowed(site.layer)[:, None]
    if recorded.keep is not None:
        tokens = np.swapaxes(counts, 1, 2) if site.pairwise else counts
        tokens[~recorded.keep[:, -tokens.shape[1] :]] = False
    return counts


def _weights_are_finite(model: Llama, site: Site) -> bool:
    """Whether every weight that a site is computed with is finite."""
    weights = model.weights
    last = model.config.num_hidden_layers - 1 if site.layer is None else site.layer
    layers = (weights.layers[i].named().values() for i in range(last + 1))
    arrays = chain([weights.embed_tokens], *layers)
    return all(np.isfinite(to_numpy(a).astype(np.float32)).all() for a in arrays)
