"""What a check and a comparison say of log-probabilities, beside the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.layers.sites import LOGPROBS, Site, logits_site, sites
from llama_layers.verify.failing_site import wide
from llama_layers.verify.logprob_arrays import NextIds, picked
from llama_layers.verify.look import Sites
from llama_layers.verify.operations import Logprobs
from llama_layers.verify.recompute import Recomputation
from llama_layers.verify.report.logprobs import (
    ALIKE,
    LogprobDifference,
    NormalDifference,
    SiteContribution,
    TokenDifference,
)
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.stored import info_of
from llama_layers.verify.validate import Recorded

# Tokens that are shown; and layers whose part in the difference is told.
_SHOWN, _CUTS = 5, 8


def summary_of_check(judged: Sites) -> LogprobDifference | None:
    """Hold the log-probabilities of a trace against those of a float64 pass over its tokens.

    None where they were not recorded, or the tokens were not.
    """
    recorded = judged.recorded
    ids = recorded.next_ids
    if LOGPROBS not in recorded.arrays or recorded.input_ids is None or ids is None:
        return None
    theirs = recorded.array(LOGPROBS)
    ids = ids[:, -theirs.shape[1] :]
    own = _Runs(judged)
    exact = own.logits("float64", theirs.shape[1])
    right = own.picked(exact, ids)
    port = wide(picked(theirs, ids))
    found = difference_of(("the port", "float64"), port, right, ids)
    if theirs.shape[-1] > 1:
        whole = Logprobs(exact, None, recorded.temperature).computed(exact)
        kl, largest_kl = _divergence(theirs, whole, recorded.keep)
        found = replace(found, kl=kl, largest_kl=largest_kl)
    stated, *narrower = own.dtypes(theirs)
    ours = own.picked(own.logits(stated, theirs.shape[1]), ids)
    normal = [_normal(stated, ours, right, ids)]
    if found.rms > ALIKE * normal[0].rms:
        runs = ((d, own.picked(own.logits(d, theirs.shape[1]), ids)) for d in narrower)
        tried = (_normal(dtype, picks, right, ids) for dtype, picks in runs)
        # The port's difference may be as large as one of these, and not much smaller.
        alike = (n for n in tried if n.rms / ALIKE <= found.rms <= ALIKE * n.rms)
        normal += islice(alike, 1)
    tokens = tuple(
        replace(t, normal=float((ours - right)[t.sequence, t.token - 1])) for t in found.tokens
    )
    contributions: tuple[SiteContribution, ...] = ()
    if judged.asked.explains:
        contributions = tuple(_contributions(judged, own, port, right, ids))
    return replace(found, tokens=tokens, normal=tuple(normal), contributions=contributions)


def _normal(dtype: str, ours: Float64Array, right: Float64Array, ids: NextIds) -> NormalDifference:
    found = difference_of(("our own run", "float64"), ours, right, ids)
    return NormalDifference(dtype, found.rms, found.largest)


class _Runs:
    """Our own runs on the tokens of a trace."""

    def __init__(self, judged: Sites) -> None:
        self._judged = judged
        name = logits_site(judged.model.config)
        self._logits = next(s for s in sites(judged.model.config) if s.name == name)
        self._alone = set(judged.recorded.arrays) == {LOGPROBS}

    def logits(self, dtype: str, rows: int, since: str | None = None) -> np.ndarray:
        """The logits of a run from the tokens on, or from the port's array of a site."""
        recorded, model = self._judged.recorded, self._judged.model
        if since == self._logits.name:
            return recorded.array(since)
        if self._alone:
            walk = self._judged.recomputed.walk(dtype)  # which has computed them already
        else:
            arrays = {} if since is None else {since: recorded.arrays[since]}
            walk = Recomputation(replace(recorded, arrays=arrays), model, dtype)
        return walk.array(self._logits)[:, -rows:]

    def picked(self, logits: np.ndarray, ids: NextIds) -> Float64Array:
        """The log-probabilities of tokens, [B, S]."""
        operation = Logprobs(logits, ids, self._judged.recorded.temperature)
        found = operation.computed(wide(logits))
        return np.asarray(found[..., 0])

    def dtypes(self, theirs: np.ndarray) -> Iterator[str]:
        """The port's dtype, as far as it is known, and narrower ones that it may have."""
        stated = self._judged.asked.dtype or theirs.dtype.name
        yield stated
        if "dtype" not in self._judged.recorded.metadata:
            digits = FLOATS[stated].precision
            yield from (
                f for f in ("float32", "float16", "bfloat16") if FLOATS[f].precision < digits
            )


@np.errstate(all="ignore")  # of minus infinity
def difference_of(
    names: tuple[str, str], first: Float64Array, second: Float64Array, ids: NextIds
) -> LogprobDifference:
    """The difference of two arrays [B, S] at tokens whose ids are known."""
    known = ids >= 0
    d = np.where(first == second, 0.0, first - second)
    off = np.where(known, np.abs(d), -1.0)
    off[known & np.isnan(off)] = np.inf
    order = np.argsort(-off, axis=None, kind="stable")[: min(_SHOWN, int(known.sum()))]
    tokens = tuple(
        TokenDifference(int(b), int(s) + 1, int(ids[b, s]), float(first[b, s]), float(second[b, s]))
        for b, s in (np.unravel_index(place, off.shape) for place in order)
    )
    d = d[known]
    if not d.size:
        return LogprobDifference(names, 0, 0.0, 0.0, 0.0, 0.0)
    return LogprobDifference(
        names,
        int(d.size),
        _rms(d),
        float(off.max()),
        float(d.mean()),
        float(np.mean(np.expm1(-d) + d)),
        tokens=tokens,
    )


def _rms(numbers: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(numbers)))) if numbers.size else 0.0


@np.errstate(all="ignore")
def _divergence(
    first: np.ndarray, second: np.ndarray, keep: NDArray[np.bool_] | None
) -> tuple[float, float]:
    """KL of each place, from the log-probabilities of all tokens: the mean, and the largest."""
    numbers = wide(first)
    p = np.exp(numbers)
    kl = np.sum(np.where(p > 0, p * (numbers - second), 0.0), axis=-1)
    kl = kl.ravel() if keep is None else kl[keep[:, -kl.shape[1] :]]
    return (float(kl.mean()), float(kl.max())) if kl.size else (0.0, 0.0)


def _contributions(
    judged: Sites, own: _Runs, port: Float64Array, right: Float64Array, ids: NextIds
) -> Iterator[SiteContribution]:
    """What the recorded sites add, each by a float64 run from there on."""
    known, before = ids >= 0, right
    for site in _cuts(judged.recorded, ids.shape[1]):
        here = own.picked(own.logits("float64", ids.shape[1], site.name), ids)
        injected, inherited = (_rms((y - before)[known]) for y in (here, right))
        yield SiteContribution(site.name, injected, inherited)
        before = here
    if before is not right:
        injected, inherited = (_rms((y - before)[known]) for y in (port, right))
        yield SiteContribution(LOGPROBS, injected, inherited)


def _cuts(recorded: Recorded, rows: int) -> list[Site]:
    """Recorded sites through which everything goes: some layers' outputs, and all outside."""

    def complete(site: Site) -> bool:
        name = site.name
        return name in recorded.arrays and info_of(recorded.arrays, name).shape[1] >= rows

    stream = [s for s in sites(recorded.config) if s.role == "layer" or s.layer is None]
    found = [s for s in stream if s.name != LOGPROBS and complete(s)]
    layers = [s for s in found if s.layer is not None]
    if len(layers) > _CUTS:
        places = np.linspace(0, len(layers) - 1, _CUTS).round().astype(int)
        layers = [layers[place] for place in places]
    return [s for s in found if s.layer is None or s in layers]


def summary_of_comparison(
    first: np.ndarray, second: np.ndarray, ids: NextIds, keep: NDArray[np.bool_] | None
) -> LogprobDifference | None:
    """Hold the log-probabilities of two traces against each other; None if both have none."""
    if not (ids >= 0).any():
        return None
    a, b = (wide(picked(array, ids)) for array in (first, second))
    found = difference_of(("the first", "the second"), a, b, ids)
    if first.shape[-1] > 1:
        kl, largest_kl = _divergence(first, wide(second), keep)
        found = replace(found, kl=kl, largest_kl=largest_kl)
    return found
