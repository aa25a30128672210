"""Whether the traces of ranks come in the order of the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from llama_layers.errors import TraceError
from llama_layers.layers.sites import Site, sites
from llama_layers.parallel.plan import SUMMED
from llama_layers.verify.distance import distance
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.join import JoinedTrace
from llama_layers.verify.look import Sites

# A part that is as close to what the model gives for some heads or channels is of those.
_NEAR = 0.1


def check_order(trace: JoinedTrace, judged: Sites) -> None:
    """Raise TraceError if ranks have what others should have, and all is there in another order.

    The first layer tells: a port in which a layer is wrong on some ranks is still checked.
    """
    every = (site for site in sites(judged.model.config) if _is_told_by(site, trace, judged))
    for _, of_layer in groupby(every, key=lambda site: site.layer):
        found = [(site, order) for site in of_layer if (order := _order(trace, judged, site))]
        orders = [order for _, order in found]
        if orders and orders == orders[:1] * len(orders) and orders[0] != sorted(orders[0]):
            raise TraceError(
                f"traces: expected one of each rank, in their order, got those of ranks "
                f"{', '.join(map(str, orders[0]))}, as {found[0][0].name} tells; a shell lists "
                f"rank10 before rank2"
            )
        return


def _is_told_by(site: Site, trace: JoinedTrace, judged: Sites) -> bool:
    """Whether each rank has a part of its own of a product with what all ranks have."""
    if site.operation != "linear" or site.role in SUMMED or site.name not in trace.places:
        return False
    own = _own(trace, site)
    return sum(map(len, own)) == len({place for of_rank in own for place in of_rank})


def _order(trace: JoinedTrace, judged: Sites, site: Site) -> list[int] | None:
    """Which rank each trace is of; None if a part fits nowhere, or in several places."""
    evidence = judged.evidence(site)
    if not isinstance(evidence, FailingSite):
        return None
    own, axis = _own(trace, site), site.split_axis
    shape, count = evidence.computed.shape, sum(map(len, own))
    by_unit = (*shape[:axis], count, math.prod(shape[axis:]) // count)
    exact = evidence.bound(evidence.formats).exact.reshape(by_unit)
    computed = evidence.computed.reshape(by_unit)
    starts = {0}
    for places in own:
        starts |= {start + len(places) for start in starts}
    found = []
    for places in own:
        part, size = computed.take(places, axis), len(places)
        fitting = [
            start
            for start in starts
            if start + size <= count
            and distance(exact.take(range(start, start + size), axis), part) < _NEAR
        ]
        if len(fitting) != 1:
            return None
        found += fitting
    ranks = np.argsort(found, kind="stable")
    sizes = np.array([len(own[rank]) for rank in ranks])
    if [found[rank] for rank in ranks] != list(np.cumsum(sizes) - sizes):
        return None
    return [int(rank) for rank in np.argsort(ranks)]


def _own(trace: JoinedTrace, site: Site) -> Sequence[list[int]]:
    """The heads, channels or tokens of each rank."""
    return [[place for place in own if place is not None] for own in trace.places[site.name]]
