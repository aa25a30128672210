"""Mistakes in attention: what it reads, how it weighs, and where it puts the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Computable,
    Float64Array,
    Formula,
    Hypothesis,
    Kind,
    Moved,
    wide,
)
from llama_layers.verify.hypotheses.masks import masked
from llama_layers.verify.operations import (
    Attention,
    Formats,
    Probabilities,
    Rope,
    Scores,
    Softmax,
    WeightedSum,
)
from llama_layers.verify.suspect import Suspect

_Summed = Attention | WeightedSum
_Weighed = Attention | Probabilities | Softmax
_Keyed = Attention | Probabilities | Scores
# Tokens up to which every first key of every query is tried.
_FEW_TOKENS = 512
# Queries in which the heads of queries and keys are looked for.
_FEW_QUERIES = 3


def _values(operation: Attention | WeightedSum, heads: int) -> Float64Array:
    v = wide(operation.v).transpose(0, 2, 1, 3)
    return np.repeat(v, heads // v.shape[1], axis=1)


def _scores(operation: Any, suspect: Suspect) -> tuple[Float64Array, Float64Array]:
    """Scores [B, heads, S, T], and the roundings that each has been through."""
    if isinstance(operation, Softmax):
        scores = wide(operation.scores)
        return scores, np.abs(scores)
    q, k = (wide(y).transpose(0, 2, 3, 1) for y in (operation.q, operation.k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    roundings = (q.shape[2] + 4) * abs(operation.scale)
    return (
        q.swapaxes(-1, -2) @ k * operation.scale,
        np.abs(q).swapaxes(-1, -2) @ np.abs(k) * roundings,
    )


def _weighed(
    *functions: Callable[[Float64Array, NDArray[np.bool_]], Float64Array],
) -> Callable[[Any, Suspect], Iterator[Computable]]:
    """Attention with weights that are another function of scores and mask."""

    def changes(operation: Any, suspect: Suspect) -> Iterator[Computable]:
        scores, roundings = _scores(operation, suspect)
        allowed = np.broadcast_to(operation.mask[:, None], scores.shape)
        worst = np.max(np.where(allowed, roundings + np.abs(scores), 0), axis=-1, keepdims=True)
        growth = 2 * worst.max(axis=2, keepdims=True) + 2 * scores.shape[-1] + 20
        for weights in functions:
            with np.errstate(all="ignore"):
                exact = weights(scores, allowed)
                magnitude = np.abs(exact)
                if isinstance(operation, Attention):
                    v = _values(operation, scores.shape[1])
                    exact, magnitude = exact @ v, magnitude @ np.abs(v)
                magnitude = magnitude * growth
            if isinstance(operation, Attention):
                exact, magnitude = (y.transpose(0, 2, 1, 3) for y in (exact, magnitude))
            yield Formula(exact, magnitude, 1)

    return changes


def _exponentials(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    hidden = np.where(allowed, scores, -np.inf)
    largest = hidden.max(axis=-1, keepdims=True)
    return np.asarray(np.exp(hidden - np.where(np.isfinite(largest), largest, 0)))


def _over_queries(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = np.exp(np.where(allowed, scores, -np.inf) - scores.max())
    return np.asarray(weights / weights.sum(axis=-2, keepdims=True))


def _over_queries_too(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = _exponentials(scores, allowed)
    weights = weights / weights.sum(axis=-2, keepdims=True)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _unshifted(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return np.asarray(np.exp(np.where(allowed, scores, -np.inf)))


def _overflowing(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = np.exp(np.where(allowed, scores, -np.inf).astype(np.float32))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True)).astype(np.float64)


def _one_more(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = _exponentials(scores, allowed)
    largest = np.where(allowed, scores, -np.inf).max(axis=-1, keepdims=True)
    return np.asarray(weights / (weights.sum(axis=-1, keepdims=True) + np.exp(-largest)))


def _masked_afterwards(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return _softmax(scores) * allowed


def _softmax(scores: Float64Array) -> Float64Array:
    weights = _exponentials(scores, np.ones(scores.shape, bool))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _hidden_at(
    value: float, added: bool = False
) -> Callable[[Float64Array, NDArray[np.bool_]], Float64Array]:
    def weights(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
        return _softmax(np.where(allowed, scores, scores + value if added else value))

    return weights


def _scores_themselves(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return np.where(allowed, scores, 0.0)


def _another_array(field: str, role: str) -> Callable[[Any, Suspect], Iterator[Computable]]:
    def changes(operation: Any, suspect: Suspect) -> Iterator[Computable]:
        array = suspect.beside(role)
        if array is not None and hasattr(operation, field):
            array = array.reshape(getattr(operation, field).shape)
            yield replace(operation, **{field: array})

    return changes


def _turned(
    *fields: str,
) -> Callable[[Any, Suspect], Iterator[Computable]]:
    """Some of queries, keys and values, turned by RoPE once more."""

    def changes(operation: Any, suspect: Suspect) -> Iterator[Computable]:
        recorded = suspect.recorded
        if not all(hasattr(operation, field) for field in fields):
            return
        for layout in ("half", "interleaved"):
            turned = {
                field: Rope(
                    getattr(operation, field), recorded.positions, recorded.config, layout
                ).bound(Formats("float64", "float64"))
                for field in fields
            }
            yield Blurred(
                replace(operation, **{field: turned[field].exact for field in fields}),
                suspect.formats,
            )

    return changes


class Blurred:
    """An operation of inputs that were rounded in between, which it is told exactly."""

    def __init__(self, operation: Any, formats: Formats) -> None:
        self.operation = operation

    def bound(self, formats: Formats) -> Any:
        """Twice the bound, for roundings of the inputs that nobody recorded."""
        bound = self.operation.bound(formats)
        return replace(bound, limit=4 * bound.limit, usual=4 * bound.usual)


def _another_layers(operation: Any, suspect: Suspect) -> Iterator[Change]:
    """Keys or values that were kept for another layer."""
    recorded = suspect.recorded
    for layer in range(recorded.config.num_hidden_layers):
        if layer == suspect.site.layer:
            continue
        name = f"model.layers.{layer}.self_attn"
        others = {"k": suspect.array(f"{name}.k_rope"), "v": suspect.array(f"{name}.v_proj")}
        found = {
            field: array.reshape(getattr(operation, field).shape)
            for field, array in others.items()
            if array is not None and hasattr(operation, field)
        }
        each = [{field: array} for field, array in found.items()]
        for fields in [found, *each] if len(found) > 1 else each:
            words = " and ".join({"k": "keys", "v": "values"}[field] for field in fields)
            yield Change(
                replace(operation, **fields),
                f"The port seems to read {words} of layer {layer}; this is layer "
                f"{suspect.site.layer}.",
            )


def _in_order(suspect: Suspect, heads: NDArray[np.intp]) -> Moved:
    return Moved(suspect, lambda y: y[:, :, heads])


def _heads_mixed(operation: Any, suspect: Suspect) -> Iterator[Computable]:
    heads = suspect.computed.shape[2]

    def moved(*axes: int) -> Callable[[Float64Array], Float64Array]:
        return lambda y: y.transpose(axes).reshape(y.shape)

    yield Moved(suspect, moved(0, 2, 1, 3))
    yield Moved(suspect, moved(0, 1, 3, 2))
    yield Moved(suspect, lambda y: y[:, :, ::-1])
    groups = suspect.recorded.config.num_key_value_heads
    order = np.arange(heads)
    for split in (groups, heads // groups):
        within = order.reshape(split, -1)
        for other in (within.T.ravel(), within[:, ::-1].ravel()):
            yield _in_order(suspect, other)


def _other_tokens(operation: Attention, suspect: Suspect) -> Iterator[Change]:
    """For each query, the first key that it seems to see; or the last."""
    count = suspect.recorded.count
    if count > _FEW_TOKENS or not np.isfinite(suspect.computed.astype(np.float64)).all():
        return
    scores, _ = _scores(operation, suspect)
    v, computed = _values(operation, scores.shape[1]), wide(suspect.computed)
    allowed = np.broadcast_to(np.asarray(operation.mask), (len(v), count, count))
    found = np.array(allowed)
    for batch, query in np.ndindex(len(v), count):
        keys = np.flatnonzero(allowed[batch, query])
        if keys.size:
            theirs = computed[batch, query]
            seen = _best_run(scores[batch, :, query], v[batch], keys, theirs)
            found[batch, query] = seen
    if (found == allowed).all():
        return
    yield Change(
        masked(operation, found), f"The port seems to see {_seen_by(found[0], allowed[0])}."
    )


def _best_run(
    scores: Float64Array, v: Float64Array, keys: NDArray[Any], computed: Float64Array
) -> NDArray[np.bool_]:
    """The keys from some first one on, or up to some last one, that explain a query best."""
    best, chosen = np.inf, np.zeros(scores.shape[-1], bool)
    chosen[keys] = True
    for order in (keys[::-1], keys):
        weights = np.exp(scores[:, order] - scores[:, order].max())
        sums = np.cumsum(weights[..., None] * v[:, order], axis=1)
        with np.errstate(invalid="ignore"):
            runs = sums / np.cumsum(weights, axis=1)[..., None]
            errors = np.sum(np.square(runs - computed[:, None]), axis=(0, 2))
        errors = np.where(np.isnan(errors), np.inf, errors)
        length = len(keys) if errors[-1] <= 4 * errors.min() else int(np.argmin(errors)) + 1
        if errors[length - 1] < best / 4:
            best = errors[length - 1]
            chosen = np.zeros_like(chosen)
            chosen[order[:length]] = True
    return chosen


def _other_heads(operation: Attention, suspect: Suspect) -> Iterator[Change]:
    """For each head of the result, the query head and the key head that it is of."""
    ratio = suspect.bound(suspect.formats).ratio(suspect.computed).max(axis=(0, 2, 3))
    few = np.argsort(-ratio, kind="stable")[:_FEW_QUERIES]
    q, k, v = (wide(y).transpose(0, 2, 1, 3) for y in (operation.q, operation.k, operation.v))
    scores = q[:, :, None, few] @ k[:, None].swapaxes(-1, -2) * operation.scale
    allowed = np.broadcast_to(np.asarray(operation.mask)[:, None, None, few], scores.shape)
    weights = _exponentials(scores, allowed)
    total = weights.sum(axis=-1, keepdims=True)
    every = weights @ v[:, None] / np.where(total == 0, 1.0, total)  # [B, heads, kv, few, D]
    computed = wide(suspect.computed)[:, few].transpose(0, 2, 1, 3)
    errors = np.array(
        [
            np.sum(np.square(every - head[:, None, None]), axis=(0, 3, 4))
            for head in computed.swapaxes(0, 1)
        ]
    )
    queries, keys = np.divmod(errors.reshape(len(errors), -1).argmin(axis=1), k.shape[1])
    yield Change(
        replace(
            operation,
            q=operation.q[:, :, queries],
            k=operation.k[:, :, keys],
            v=operation.v[:, :, keys],
        ),
        "The port seems to have in its heads the result of query heads "
        f"{', '.join(map(str, queries[:8]))} and key heads {', '.join(map(str, keys[:8]))}"
        f"{' ...' if len(keys) > 8 else ''}.",
    )


def _seen_by(found: NDArray[np.bool_], allowed: NDArray[np.bool_]) -> str:
    said = []
    for query in np.flatnonzero((found != allowed).any(axis=-1)):
        seen = np.flatnonzero(found[query])
        said.append(f"tokens {seen[0]}..{seen[-1]} from token {query}")
    more = f" and other ones from {len(said) - 3} tokens more" if len(said) > 3 else ""
    return ", ".join(said[:3]) + more


HYPOTHESES = (
    Hypothesis(
        "softmax over the queries",
        _Weighed,
        _weighed(_over_queries),
        "The port seems to normalise over the queries; it should be over the keys.",
    ),
    Hypothesis(
        "softmax over queries and keys",
        _Weighed,
        _weighed(_over_queries_too),
        "The port seems to normalise over the queries and then over the keys; it should be over "
        "the keys alone.",
    ),
    Hypothesis(
        "softmax not normalised",
        _Weighed,
        _weighed(_exponentials),
        "The port seems not to divide the exponentials by their sum.",
    ),
    Hypothesis(
        "exponentials without softmax",
        _Weighed,
        _weighed(_unshifted),
        "The port seems to weigh with the exponentials of the scores themselves.",
    ),
    Hypothesis(
        "softmax without the shift",
        _Weighed,
        _weighed(_overflowing),
        "The port seems to take exponentials without subtracting the largest score, and they "
        "overflow.",
    ),
    Hypothesis(
        "softmax with one more",
        _Weighed,
        _weighed(_one_more),
        "The port seems to add one to the sum of the exponentials.",
    ),
    Hypothesis(
        "masked after softmax",
        _Weighed,
        _weighed(_masked_afterwards),
        "The port seems to hide keys after the softmax; they should be hidden before it.",
    ),
    Hypothesis(
        "hidden keys at -1e4",
        _Weighed,
        _weighed(_hidden_at(-1e4), _hidden_at(-1e4, added=True)),
        "The port seems to give hidden keys a score of -1e4, which low scores come near; it should "
        "be minus infinity.",
    ),
    Hypothesis(
        "hidden keys at 0",
        _Weighed,
        _weighed(_hidden_at(0.0)),
        "The port seems to give hidden keys a score of 0; it should be minus infinity.",
    ),
    Hypothesis(
        "softmax left out",
        _Weighed,
        _weighed(_scores_themselves),
        "The port seems to weigh with the scores themselves; it should be their softmax.",
    ),
    Hypothesis(
        "keys for values",
        _Summed,
        _another_array("v", "self_attn.k_rope"),
        "The port seems to weigh the keys; it should be the values.",
    ),
    Hypothesis(
        "keys before RoPE for values",
        _Summed,
        _another_array("v", "self_attn.k_proj"),
        "The port seems to weigh the keys before RoPE; it should be the values.",
    ),
    Hypothesis(
        "values for keys",
        _Keyed,
        _another_array("k", "self_attn.v_proj"),
        "The port seems to score the values; it should be the keys.",
    ),
    Hypothesis(
        "queries before RoPE",
        _Keyed,
        _another_array("q", "self_attn.q_proj"),
        "The port seems to score queries that RoPE has not turned.",
    ),
    Hypothesis(
        "keys before RoPE",
        _Keyed,
        _another_array("k", "self_attn.k_proj"),
        "The port seems to score keys that RoPE has not turned.",
    ),
    Hypothesis(
        "values turned by RoPE",
        _Summed,
        _turned("v"),
        "The port seems to turn the values, too; RoPE is for queries and keys.",
    ),
    Hypothesis(
        "keys turned twice",
        _Keyed,
        _turned("k"),
        "The port seems to turn keys that are turned already.",
    ),
    Hypothesis(
        "queries turned twice",
        _Keyed,
        _turned("q"),
        "The port seems to turn queries that are turned already.",
    ),
    Hypothesis("another layer's keys and values", _Keyed | WeightedSum, _another_layers),
    Hypothesis(
        "heads mixed up",
        _Summed,
        _heads_mixed,
        "The port seems to put the heads of the result in another order: [B, S, heads, D] is due.",
    ),
    Hypothesis("other heads", Attention, _other_heads, kind=Kind.SOLVED),
    Hypothesis("other tokens seen", Attention, _other_tokens, kind=Kind.SOLVED),
)
