"""The tokens that attention saw, and whose heads it has, read off the port's own array."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.attention_arrays import (
    capped,
    scores_of,
    sinks_of,
    softmax,
    values_of,
)
from llama_layers.verify.mistakes.masks import masked
from llama_layers.verify.mistakes.near import weighed, worst_tokens
from llama_layers.verify.mistakes.registry import Changed, Kind, mistake
from llama_layers.verify.operations import Attention
from llama_layers.verify.report.wording import listed
from llama_layers.verify.roundoff import Float64Array

# Tokens up to which every first key of every query is tried.
_FEW_TOKENS = 512
# Queries in which the heads of queries and keys are looked for.
_FEW_QUERIES = 3


@mistake(Attention, "other heads", kind=Kind.SOLVED)
def _(operation: Attention, at: FailingSite) -> Changed | None:
    """Has in its heads the result of query heads {0} and key heads {1}."""
    # For each head of the result, the query head and the key head that it is of.
    ratio = at.bound(at.formats).ratio(at.computed).max(axis=(0, 2, 3))
    few = np.argsort(-ratio, kind="stable")[:_FEW_QUERIES]
    q, k, v = (wide(y).transpose(0, 2, 1, 3) for y in (operation.q, operation.k, operation.v))
    scores = q[:, :, None, few] @ k[:, None].swapaxes(-1, -2) * operation.scale
    scores = capped(scores, operation.cap)
    allowed = np.broadcast_to(np.asarray(operation.mask)[:, None, None, few], scores.shape)
    sinks = sinks_of(operation)[:, None]
    every = softmax(scores, allowed, sinks) @ v[:, None]  # [B, heads, kv, few, D]
    computed = wide(at.computed)[:, few].transpose(0, 2, 1, 3)
    errors = np.array(
        [
            np.sum(np.square(every - head[:, None, None]), axis=(0, 3, 4))
            for head in computed.swapaxes(0, 1)
        ]
    )
    queries, keys = np.divmod(errors.reshape(len(errors), -1).argmin(axis=1), k.shape[1])
    found = {"q": queries, "k": keys, "v": keys}
    fields = {name: getattr(operation, name)[:, :, heads] for name, heads in found.items()}
    return replace(operation, **fields), listed(queries.tolist(), 8), listed(keys.tolist(), 8)


@mistake(Attention, "other tokens seen", kind=Kind.SOLVED)
def _(operation: Attention, at: FailingSite) -> Changed | None:
    """Sees {0}."""
    # For each query, the first key that it seems to see; or the last.
    count = at.recorded.count
    if count > _FEW_TOKENS or not np.isfinite(at.computed.astype(np.float64)).all():
        return None
    scores, v, computed = scores_of(operation), values_of(operation), wide(at.computed)
    allowed = np.broadcast_to(np.asarray(operation.mask), (len(v), count, count))
    found, sinks = np.array(allowed), sinks_of(operation)[..., 0]
    # The worst queries tell whether there is anything to find in the others.
    for queries in (worst_tokens(at), np.arange(count)):
        for batch, query in product(range(len(v)), queries):
            keys = np.flatnonzero(allowed[batch, query])
            if keys.size:
                theirs = computed[batch, query]
                own = scores[batch, :, query]
                found[batch, query] = _best_run(own, sinks, v[batch], keys, theirs)
        if weighed(replace(operation, mask=found), at, Attention.formula) is None:
            return None
    if (found == allowed).all():
        return None
    return masked(operation, found), _seen_by(found[0], allowed[0])


def _best_run(
    scores: Float64Array,
    sinks: Float64Array,
    v: Float64Array,
    keys: np.ndarray,
    computed: Float64Array,
) -> NDArray[np.bool_]:
    """The keys from some first one on, or up to some last one, that explain a query best."""
    best, chosen = np.inf, np.zeros(scores.shape[-1], bool)
    chosen[keys] = True
    for order in (keys[::-1], keys):
        largest = max(scores[:, order].max(), sinks.max())
        weights = np.exp(scores[:, order] - largest)
        sums = np.cumsum(weights[..., None] * v[:, order], axis=1)
        with np.errstate(invalid="ignore"):
            totals = np.cumsum(weights, axis=1) + np.exp(sinks - largest)
            runs = sums / totals[..., None]
            errors = np.sum(np.square(runs - computed[:, None]), axis=(0, 2))
        errors = np.where(np.isnan(errors), np.inf, errors)
        length = len(keys) if errors[-1] <= 4 * errors.min() else int(np.argmin(errors)) + 1
        if errors[length - 1] < best / 4:
            best = errors[length - 1]
            chosen = np.zeros_like(chosen)
            chosen[order[:length]] = True
    return chosen


def _seen_by(found: NDArray[np.bool_], allowed: NDArray[np.bool_]) -> str:
    said = []
    for query in np.flatnonzero((found != allowed).any(axis=-1)):
        seen = np.flatnonzero(found[query])
        said.append(f"tokens {seen[0]}..{seen[-1]} from token {query}")
    more = f" and others from {len(said) - 3} more tokens" if len(said) > 3 else ""
    return ", ".join(said[:3]) + more
