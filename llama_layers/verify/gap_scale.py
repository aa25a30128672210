"""Factors of arrays that were not recorded, fitted to the site that is computed from them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from llama_layers.layers.sites import Site
from llama_layers.verify.build import operation_of
from llama_layers.verify.failing_site import Computable
from llama_layers.verify.gap_trial import Candidate, Part, Trial
from llama_layers.verify.mistakes import MISTAKES, Kind
from llama_layers.verify.mistakes.fitted import right_scale
from llama_layers.verify.mistakes.registry import moved
from llama_layers.verify.mistakes.streams import right_factor
from llama_layers.verify.operations import Attention, Operation, Residual
from llama_layers.verify.recompute import Change
from llama_layers.verify.validate import Recorded

# The names of what is scaled, by the operation of a site.
_NAMES = {"residual": "added block scaled", "attention": "scores scaled"}
_SCALED = "everything scaled"
# Steps of a fit, and by what a factor is moved to see what that changes.
_STEPS, _MOVE = 12, 1e-3
# A fit goes on as long as a step leaves less than that share of the squared errors, and explains
# something if it has left less than that.
_BETTER, _LESS = 0.9, 0.25


def scaled(
    trial: Trial, extents: list[tuple[Site, ...]], only: Collection[str] | None
) -> Iterator[Candidate]:
    """Whatever is at some sites, times the factor that explains most of the difference."""
    for places in extents:
        name = _NAMES.get(places[0].operation, _SCALED)
        if only is not None and name not in only:
            continue
        factor = _fitted(trial.few, places, 1.0)
        if trial.few is not trial.whole and factor is not None:
            factor = _fitted(trial.whole, places, factor) or factor
        if factor is None:
            continue
        mistake = next(m for m in MISTAKES if m.name == name)
        where = "" if len(places) > 1 else f" That is at {places[0].name}."
        names, change = {p.name for p in places}, _times(places, factor)
        detail = mistake.sentence(*_words(trial.whole, places[0], factor)) + where
        yield Candidate(name, detail, (detail, 0), Kind.SOLVED, False, False, names, change, change)


def _words(part: Part, place: Site, factor: float) -> tuple[object, ...]:
    """The words of the sentence that tells of a factor."""
    operation = operation_of(place, place.routes[-1], part.before([place.name]), part.model)
    if isinstance(operation, Attention):
        return factor * operation.scale, right_scale(operation, part.model.config)
    if isinstance(operation, Residual):
        return factor * operation.multiplier, right_factor(operation)
    return factor, ""


def _fitted(part: Part, places: tuple[Site, ...], factor: float) -> float | None:
    """The factor that leaves least, by Gauss and Newton; None if none leaves much less."""
    names = {place.name for place in places}
    start = least = np.inf
    best = None
    for step in range(_STEPS):
        here, there = (
            np.where(part.counted, part.changed(_times(places, by), names), 0.0).astype(np.float64)
            for by in (factor, factor * (1 + _MOVE))
        )
        off = np.where(part.counted, part.array.astype(np.float64), 0.0) - here
        error = float(np.sum(np.square(off)))
        if not step:
            start = error
        if not error < least:
            break
        done = step > 0 and error > _BETTER * least
        least, best = error, factor
        slope = (there - here) / (factor * _MOVE)
        size = float(np.sum(np.square(slope)))
        move = float(np.sum(off * slope)) / size if size > 0 else np.nan
        factor = float(np.clip(factor + move, factor / 4, factor * 4))
        if done or not np.isfinite(move):
            break
    return best if least < _LESS * start else None


def _times(places: tuple[Site, ...], factor: float) -> Change:
    names = {place.name for place in places}

    def change(site: Site, operation: Operation, known: Recorded) -> Computable:
        if site.name not in names:
            return operation
        if isinstance(operation, Attention):
            return replace(operation, scale=factor * operation.scale)
        if isinstance(operation, Residual):
            return replace(operation, multiplier=factor * operation.multiplier)
        return moved(operation, lambda y: factor * y)

    return change
