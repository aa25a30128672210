"""Which rank is wrong: what ranks should have in common and do not is judged for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache, partial

import numpy as np

from llama_layers.layers.sites import Site, sites
from llama_layers.parallel.plan import SUMMED, Places
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.join import JoinedTrace, recorded_by_ranks
from llama_layers.verify.look import Look, Sites
from llama_layers.verify.operations import Linear
from llama_layers.verify.report import SITE_VERDICTS, SiteResult
from llama_layers.verify.split_sites import reshaped
from llama_layers.verify.stored import StoredArray, StoredArrays, stored
from llama_layers.verify.validate import Recorded

_UNFIT = ("FAIL", "DIFFERS")
# Layers in which the model is asked whether ranks recorded partial sums.
_LOOKED_AT = 3


def settled(trace: JoinedTrace, judged: Sites) -> tuple[JoinedTrace, Sites]:
    """A joined trace and its sites, once the model has told partial sums from a sum that is wrong.

    If a rank's array is the whole sum by itself, and some rank's is not its part, ranks recorded it
    after they had added their parts.
    """
    every = [site for site in sites(judged.model.config) if site.name in trace.parts]
    for role in SUMMED:
        of_role = [site for site in every if site.role == role]
        for site in of_role[:_LOOKED_AT]:
            if _wrong_parts(trace, judged, site) == []:
                break
            whole = (_alone(judged, site, array) for array in trace.parts[site.name])
            if any(look.result.verdict not in _UNFIT for look in whole):
                trace = trace.added(site.name for site in of_role)
                recorded = recorded_by_ranks(trace, judged.model.config)
                judged = replace(judged, recorded=recorded)
                break
    return trace, judged


def named_ranks(trace: JoinedTrace, judged: Sites, looks: Iterable[Look]) -> Iterator[Look]:
    """Looks at the sites of a trace, with remarks on the ranks that are wrong.

    Where ranks differ, the look is that of a rank that is wrong, if there is one.
    """
    misplaced: set[str] = set()  # roles for which it was looked for

    @cache
    def of_rank(rank: int) -> Sites:
        recorded = recorded_by_ranks(trace.of_rank(rank), judged.model.config)
        return replace(judged, recorded=replace(recorded, rank=rank))

    def own(look: Look) -> dict[int, Look]:
        """What each rank has of a site, held against what it has of others."""
        site, fails = look.result.site, look.result.verdict == "FAIL"
        others = {r for n in (site.name, *look.result.inputs) for r in trace.differing.get(n, ())}
        if fails and site.name in trace.places:
            others = set(range(trace.size))
        return {
            rank: replace(of_rank(rank).look(site), sites=of_rank(rank)) if rank in others else look
            for rank in range(trace.size)
        }

    for look in looks:
        site, fails = look.result.site, look.result.verdict == "FAIL"
        split = site.name in trace.places
        if site.name in trace.differing:
            by_rank = own(look)
            told = _told(look, by_rank, _sharing(trace, site.name))
            lacking = _unadded(trace, judged, by_rank) if _has_parts(trace, site) else []
            said = f"the parts of other ranks were not added on {_named(lacking)}"
            yield _remarked(told, said) if lacking else told
        elif split and fails and any(name in trace.differing for name in look.result.inputs):
            yield _told(look, own(look), [])
        elif split and fails:
            owners = _owners(look.result, trace.places[site.name])
            remarks = [f"its worst elements are those of {_named(owners)}"]
            if site.role not in misplaced:
                misplaced.add(site.role)
                remarks += _misplaced(trace.places[site.name], judged, site)
            yield _remarked(look, "; ".join(remarks))
        elif site.name in trace.parts and fails:
            yield _remarked(look, _said_of_parts(trace, judged, site))
        else:
            yield look


def _unadded(trace: JoinedTrace, judged: Sites, looks: dict[int, Look]) -> list[int]:
    """The ranks that are wrong at a site since they have no more than their own part of a sum."""
    site = looks[0].result.site
    first, others = stored(trace.arrays, site.name), trace.differing[site.name]
    wrong = [rank for rank, look in looks.items() if look.result.verdict in _UNFIT]
    arrays = {rank: others.get(rank, first) for rank in wrong}
    return [rank for rank in wrong if _is_part(trace, judged, site, rank, arrays[rank])]


def _alone(judged: Sites, site: Site, array: StoredArray) -> Look:
    """The look at a rank's array, taken for the whole."""
    return replace(judged, recorded=_with(judged.recorded, {site.name: array})).look(site)


def _wrong_parts(trace: JoinedTrace, judged: Sites, site: Site) -> list[int] | None:
    """The ranks whose parts of a sum are wrong; None if what they are parts of was not recorded."""
    if not _has_parts(trace, site):
        return None
    of_ranks = enumerate(trace.parts[site.name])
    return [rank for rank, array in of_ranks if not _is_part(trace, judged, site, rank, array)]


def _has_parts(trace: JoinedTrace, site: Site) -> bool:
    """Whether a site is the sum of products with heads or channels of which each rank has some."""
    if site.role not in SUMMED:
        return False
    every = _every(trace.places.get(site.routes[0][0], ()))
    return bool(every) and len(every) == len(set(every))


def _is_part(trace: JoinedTrace, judged: Sites, site: Site, rank: int, array: StoredArray) -> bool:
    """Whether an array is what a rank adds to a sum, with the bias or without it."""
    (source,) = site.routes[0]
    x = judged.recorded.array(source)
    part, kept = np.zeros_like(x), [p for p in trace.places[source][rank] if p is not None]
    part[:, :, kept] = x[:, :, kept]
    given = {source: stored({source: part}, source), site.name: array}
    alone = replace(judged, recorded=_with(judged.recorded, given))
    evidence = alone.evidence(site)
    assert isinstance(evidence, FailingSite)  # since its source was recorded
    assert isinstance(evidence.operation, Linear)
    ways = [evidence.operation]
    if evidence.operation.bias is not None:  # which one of the ranks adds
        ways.append(replace(evidence.operation, bias=None))
    looks = (alone.judged(replace(evidence, operation=way)) for way in ways)
    return any(look.result.verdict not in _UNFIT for look in looks)


def _said_of_parts(trace: JoinedTrace, judged: Sites, site: Site) -> str:
    """A remark on a sum that fails: whose part of it is wrong."""
    wrong = _wrong_parts(trace, judged, site)
    if wrong is None:
        return "it is the sum of what the ranks recorded"
    if wrong:
        one = len(wrong) == 1
        added = "part that {} adds is" if one else "parts that {} add are"
        return f"the {added.format(_named(wrong))} wrong"
    return "the part that each rank adds is right, except perhaps for its bias"


def _with(recorded: Recorded, others: dict[str, StoredArray]) -> Recorded:
    """The same trace with other arrays at some sites, each of the shape that it has there."""
    arrays = {name: stored(recorded.arrays, name) for name in recorded.arrays}
    for name, array in others.items():
        shape = arrays[name].info().shape
        arrays[name] = array.changed(shape, partial(reshaped, shape))
    return replace(recorded, arrays=StoredArrays(arrays))


def _misplaced(places: tuple[Places, ...], judged: Sites, site: Site) -> list[str]:
    """Remarks on ranks that have what others should have."""
    evidence = judged.evidence(site)
    if not isinstance(evidence, FailingSite):
        return []
    ratio_of, axis = evidence.bound(evidence.formats), site.split_axis
    count = len(set(_every(places)))
    shape = evidence.computed.shape
    split = (*shape[:axis], count, math.prod(shape[axis:]) // count)
    computed = evidence.computed.reshape(split).astype(np.float64)
    exact, limit = (a.reshape(split) for a in (ratio_of.exact, ratio_of.limit))
    own = [[place for place in of_rank if place is not None] for of_rank in places]

    def fits(rank: int, other: int) -> bool:
        mine, theirs = (own[r] for r in (rank, other))
        if len(mine) != len(theirs) or not mine:
            return False
        far = np.abs(computed.take(mine, axis) - exact.take(theirs, axis))
        return bool((far <= limit.take(theirs, axis)).all())

    ranks, said = range(len(places)), []
    for rank in ranks:
        if not fits(rank, rank):
            others = [other for other in ranks if other != rank and fits(rank, other)]
            said += [f"rank {rank} has what rank {other} should have" for other in others[:1]]
    return [*said, "the ranks may be in another order"] if said else []


def _every(places: tuple[Places, ...]) -> list[int]:
    """All places that ranks have, those of several ranks as often."""
    return [place for own in places for place in own if place is not None]


def _sharing(trace: JoinedTrace, name: str) -> list[int]:
    """The ranks that should have the numbers in which some differ."""
    every = ((0,),) * trace.size  # which are whole on all ranks
    places = trace.places.get(name, every)
    shared = {place for rank in trace.differing[name] for place in places[rank]} - {None}
    return [rank for rank, own in enumerate(places) if shared & set(own)]


def _told(look: Look, by_rank: dict[int, Look], sharing: list[int]) -> Look:
    """The look of a rank that is wrong, or else one that is right, with a remark on all."""
    wrong = [rank for rank, own in by_rank.items() if own.result.verdict in _UNFIT]
    if not wrong:
        if look.result.verdict in _UNFIT:  # as no rank is, held against its own arrays
            look = max(by_rank.values(), key=_severity)
        said = "ranks differ here, none by more than rounding allows"
        return _remarked(look, said) if sharing else look
    if not sharing:
        return _remarked(by_rank[wrong[0]], f"wrong on {_named(wrong)}")
    right = [rank for rank in sharing if rank not in wrong]
    said = f"ranks differ here: wrong on {_named(wrong)}"
    return _remarked(by_rank[wrong[0]], f"{said}, right on {_named(right)}" if right else said)


def _severity(look: Look) -> tuple[int, float]:
    return SITE_VERDICTS.index(look.result.verdict), look.result.ratio


def _owners(result: SiteResult, places: tuple[Places, ...]) -> list[int]:
    """The ranks that computed the worst elements."""
    count = 1 + max(place for own in places for place in own if place is not None)
    axis = result.site.split_axis
    split = (*result.shape[:axis], count, math.prod(result.shape[axis:]) // count)
    flat = [np.ravel_multi_index(e.index, result.shape) for e in result.worst if e.ratio > 1]
    units = {int(np.unravel_index(place, split)[axis]) for place in flat}
    return [rank for rank, own in enumerate(places) if units & set(own)]


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def _remarked(look: Look, remark: str) -> Look:
    note = f"{look.result.note}; {remark}" if look.result.note else remark
    return replace(look, result=replace(look.result, note=note))
