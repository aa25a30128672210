"""A failing site with the channels of queries and keys in the order in which the port has them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from llama_layers.layers.sites import sites
from llama_layers.verify.build import operation_of
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.fit import ROTATED, in_pairs
from llama_layers.verify.operations import Linear, Norm, Rope
from llama_layers.verify.stored import StoredArrays, stored


def as_written(failing: FailingSite) -> FailingSite:
    """A failing site with pairs of channels next to each other, if the port has them so.

    Such a trace is put into halves, of which RoPE is checked. But a port's mistake with a matrix,
    or in attention, is one in its own layout: a matrix that is read as its transpose, for example,
    or keys that are weighed for values.
    """
    recorded, site, config = failing.recorded, failing.site, failing.config
    route = recorded.route(site)
    here = isinstance(failing.operation, Rope) or (
        isinstance(failing.operation, Norm) and config.qk_norm != "none" and "_norm" in site.role
    )
    if recorded.metadata.get("rope_layout") != "interleaved" or here or route is None:
        return failing
    if recorded.past.arrays:  # which are keys in halves
        return failing
    rotated = {other.name for other in sites(config) if other.role in ROTATED}
    arrays = {name: stored(recorded.arrays, name) for name in recorded.arrays}
    for name in rotated & arrays.keys():
        shape = arrays[name].info().shape
        arrays[name] = arrays[name].changed(shape, partial(in_pairs, config=config))
    written = replace(recorded, arrays=StoredArrays(arrays))
    found = replace(
        failing,
        operation=operation_of(site, route, written, failing.model),
        recorded=written,
        computed=written.array(site.name),
        paired=True,
    )
    if not isinstance(found.operation, Linear) or site.role not in ROTATED:
        return found
    weight, bias = found.matrix(site.role)
    return replace(found, operation=replace(found.operation, weight=weight, bias=bias))
