"""Where the result of a site means something."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from llama_layers.layers.sites import Site
from llama_layers.verify.bound import Bound
from llama_layers.verify.validate import Recorded


def where_defined(bound: Bound, site: Site, recorded: Recorded) -> Bound:
    """A site's bound, without limits where engines may do as they like.

    Engines differ in the result of attention at padding: there it sees nothing or everything,
    at a position that each chooses for itself. Where one rank is judged, the numbers of others have
    no limit.
    """
    for places in (_places(site, recorded), _own(site, recorded, bound.exact.shape)):
        bound = bound if places is None else bound.only(places)
    return bound


def _own(site: Site, recorded: Recorded, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """Which numbers of a site that is split are those of the rank that is judged."""
    places = recorded.places.get(site.name)
    if recorded.rank is None or places is None:
        return None
    count = len({place for own in places for place in own} - {None})
    kept = [place for place in places[recorded.rank] if place is not None]
    after = shape[site.split_axis :]
    return np.repeat(np.isin(np.arange(count), kept), math.prod(after) // count).reshape(after)


def _places(site: Site, recorded: Recorded) -> NDArray[np.bool_] | None:
    keep = recorded.keep
    if keep is None:
        return None
    if site.pairwise:
        return keep[:, None, :, None]
    if site.operation == "attention" or (site.operation == "rope" and not recorded.positions_given):
        return keep[:, :, None, None]
    return None
