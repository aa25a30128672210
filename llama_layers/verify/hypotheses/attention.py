"""Mistakes in attention: what it reads, and where it puts the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Float64Array,
    Hypothesis,
    Moved,
)
from llama_layers.verify.operations import (
    Attention,
    Formats,
    Probabilities,
    Rope,
    Scores,
    WeightedSum,
)

_Summed = Attention | WeightedSum
_Keyed = Attention | Probabilities | Scores


def _another_array(field: str, role: str) -> Callable[[Any, FailingSite], Iterator[Computable]]:
    def changes(operation: Any, failing: FailingSite) -> Iterator[Computable]:
        array = failing.beside(role)
        if array is not None and hasattr(operation, field):
            array = array.reshape(getattr(operation, field).shape)
            yield replace(operation, **{field: array})

    return changes


def _turned(
    *fields: str,
) -> Callable[[Any, FailingSite], Iterator[Computable]]:
    """Some of queries, keys and values, turned by RoPE once more."""

    def changes(operation: Any, failing: FailingSite) -> Iterator[Computable]:
        recorded = failing.recorded
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
                failing.formats,
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


def _another_layers(operation: Any, failing: FailingSite) -> Iterator[Change]:
    """Keys or values that were kept for another layer."""
    recorded = failing.recorded
    for layer in range(recorded.config.num_hidden_layers):
        if layer == failing.site.layer:
            continue
        name = f"model.layers.{layer}.self_attn"
        others = {"k": failing.array(f"{name}.k_rope"), "v": failing.array(f"{name}.v_proj")}
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
                f"{failing.site.layer}.",
            )


def _in_order(failing: FailingSite, heads: NDArray[np.intp]) -> Moved:
    return Moved(failing, lambda y: y[:, :, heads])


def _heads_mixed(operation: Any, failing: FailingSite) -> Iterator[Computable]:
    heads = failing.computed.shape[2]

    def moved(*axes: int) -> Callable[[Float64Array], Float64Array]:
        return lambda y: y.transpose(axes).reshape(y.shape)

    yield Moved(failing, moved(0, 2, 1, 3))
    yield Moved(failing, moved(0, 1, 3, 2))
    yield Moved(failing, lambda y: y[:, :, ::-1])
    groups = failing.recorded.config.num_key_value_heads
    order = np.arange(heads)
    for split in (groups, heads // groups):
        within = order.reshape(split, -1)
        for other in (within.T.ravel(), within[:, ::-1].ravel()):
            yield _in_order(failing, other)


HYPOTHESES = (
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
        "The port seems to rotate the values, too; RoPE is for queries and keys.",
    ),
    Hypothesis(
        "keys turned twice",
        _Keyed,
        _turned("k"),
        "The port seems to rotate keys that are turned already.",
    ),
    Hypothesis(
        "queries turned twice",
        _Keyed,
        _turned("q"),
        "The port seems to rotate queries that are turned already.",
    ),
    Hypothesis("another layer's keys and values", _Keyed | WeightedSum, _another_layers),
    Hypothesis(
        "heads mixed up",
        _Summed,
        _heads_mixed,
        "The port seems to put the heads of the result in another order: [B, S, heads, D] is due.",
    ),
)
