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
    Moved,
    wide,
)
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


def values_of(operation: Attention | WeightedSum, heads: int) -> Float64Array:
    """The values of each query head, [B, heads, T, D]."""
    v = wide(operation.v).transpose(0, 2, 1, 3)
    return np.repeat(v, heads // v.shape[1], axis=1)


def scores_of(operation: Any, suspect: Suspect) -> tuple[Float64Array, Float64Array]:
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
        scores, roundings = scores_of(operation, suspect)
        allowed = np.broadcast_to(operation.mask[:, None], scores.shape)
        worst = np.max(np.where(allowed, roundings + np.abs(scores), 0), axis=-1, keepdims=True)
        growth = 2 * worst.max(axis=2, keepdims=True) + 2 * scores.shape[-1] + 20
        for weights in functions:
            with np.errstate(all="ignore"):
                exact = weights(scores, allowed)
                magnitude = np.abs(exact)
                if isinstance(operation, Attention):
                    v = values_of(operation, scores.shape[1])
                    exact, magnitude = exact @ v, magnitude @ np.abs(v)
                magnitude = magnitude * growth
            if isinstance(operation, Attention):
                exact, magnitude = (y.transpose(0, 2, 1, 3) for y in (exact, magnitude))
            yield Formula(exact, magnitude, 1, cached=True)

    return changes


def exponentials(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    """Of the scores above their largest; zeros for what is not allowed."""
    hidden = np.where(allowed, scores, -np.inf)
    largest = hidden.max(axis=-1, keepdims=True)
    return np.asarray(np.exp(hidden - np.where(np.isfinite(largest), largest, 0)))


def _over_queries(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = np.exp(np.where(allowed, scores, -np.inf) - scores.max())
    return np.asarray(weights / weights.sum(axis=-2, keepdims=True))


def _over_queries_too(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = exponentials(scores, allowed)
    weights = weights / weights.sum(axis=-2, keepdims=True)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _unshifted(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return np.asarray(np.exp(np.where(allowed, scores, -np.inf)))


def _overflowing(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = np.exp(np.where(allowed, scores, -np.inf).astype(np.float32))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True)).astype(np.float64)


def _one_more(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    weights = exponentials(scores, allowed)
    largest = np.where(allowed, scores, -np.inf).max(axis=-1, keepdims=True)
    return np.asarray(weights / (weights.sum(axis=-1, keepdims=True) + np.exp(-largest)))


def _masked_afterwards(scores: Float64Array, allowed: NDArray[np.bool_]) -> Float64Array:
    return _softmax(scores) * allowed


def _softmax(scores: Float64Array) -> Float64Array:
    weights = exponentials(scores, np.ones(scores.shape, bool))
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
        _weighed(exponentials),
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
)
