"""Which rank is wrong: what ranks should have in common and do not is judged for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from llama_layers.verify.join import JoinedTrace, Places, recorded_by_ranks
from llama_layers.verify.look import Look, Sites
from llama_layers.verify.report import SiteResult

_WRONG = ("FAIL", "DIFFERS")


def named_ranks(trace: JoinedTrace, judged: Sites, looks: Iterable[Look]) -> Iterator[Look]:
    """Looks at the sites of a trace, with remarks on the ranks that are wrong.

    Where ranks differ, the look is that of a rank that is wrong, if there is one.
    """

    @cache
    def of_rank(rank: int) -> Sites:
        return replace(judged, recorded=recorded_by_ranks(trace.of_rank(rank), judged.model.config))

    for look in looks:
        site = look.result.site
        if others := trace.differing.get(site.name):
            by_rank = {rank: of_rank(rank).look(site) for rank in others}
            yield _told(look, by_rank, _sharing(trace, site.name))
        elif site.name in trace.places and look.result.verdict == "FAIL":
            owners = _owners(look.result, trace.places[site.name])
            yield _remarked(look, f"its worst elements are those of {_named(owners)}")
        else:
            yield look


def _sharing(trace: JoinedTrace, name: str) -> list[int]:
    """The ranks that should have the numbers in which some differ."""
    every = ((0,),) * trace.size  # which are whole on all ranks
    places = trace.places.get(name, every)
    shared = {place for rank in trace.differing[name] for place in places[rank]} - {None}
    return [rank for rank, own in enumerate(places) if shared & set(own)]


def _told(look: Look, by_rank: dict[int, Look], ranks: list[int]) -> Look:
    """The look of a rank that is wrong, or else of the first, with a remark on all."""
    looks = {rank: by_rank.get(rank, look) for rank in ranks}
    wrong = [rank for rank in ranks if looks[rank].result.verdict in _WRONG]
    if not wrong:
        return _remarked(look, "ranks differ here, none by more than rounding allows")
    right = [rank for rank in ranks if rank not in wrong]
    said = f"ranks differ here: wrong on {_named(wrong)}"
    return _remarked(looks[wrong[0]], f"{said}, right on {_named(right)}" if right else said)


def _owners(result: SiteResult, places: tuple[Places, ...]) -> list[int]:
    """The ranks that computed the worst elements."""
    count = 1 + max(place for own in places for place in own if place is not None)
    axis = 1 if result.site.pairwise else 2
    split = (*result.shape[:axis], count, math.prod(result.shape[axis:]) // count)
    flat = [np.ravel_multi_index(e.index, result.shape) for e in result.worst if e.ratio > 1]
    units = {int(np.unravel_index(place, split)[axis]) for place in flat}
    return [rank for rank, own in enumerate(places) if units & set(own)]


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"


def _remarked(look: Look, remark: str) -> Look:
    note = f"{look.result.note}; {remark}" if look.result.note else remark
    return replace(look, result=replace(look.result, note=note))
