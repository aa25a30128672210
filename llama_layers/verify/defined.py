"""Where the result of a site means something."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_layers.layers.sites import Site
from llama_layers.verify.bound import Bound
from llama_layers.verify.validate import Recorded


def where_defined(bound: Bound, site: Site, recorded: Recorded) -> Bound:
    """A site's bound, without limits where engines may do as they like.

    Engines differ in the result of attention at padding: there it sees nothing or everything,
    at a position that each chooses for itself.
    """
    places = _places(site, recorded)
    return bound if places is None else bound.only(places)


def _places(site: Site, recorded: Recorded) -> NDArray[np.bool_] | None:
    keep = recorded.keep
    if keep is None:
        return None
    if site.pairwise:
        return keep[:, None, :, None]
    if site.operation == "attention" or (site.operation == "rope" and not recorded.positions_given):
        return keep[:, :, None, None]
    return None
