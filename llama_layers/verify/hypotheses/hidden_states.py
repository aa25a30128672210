"""Outputs of layers as transformers' output_hidden_states counts them.

Of L layers it gives L + 1 arrays: what goes into each layer, and the last one's output after the
model's norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.model.llama import Llama
from llama_layers.verify.bounds import Bound
from llama_layers.verify.distance import distance
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Float64Array,
    Formula,
    Hypothesis,
    wide,
)
from llama_layers.verify.operations import Embedding, Formats, Norm, Residual
from llama_layers.verify.validate import Recorded

NORMED, LATE = "hidden state normalised already", "hidden states one place late"
DETAIL = (
    "The array is what goes into the layer, as hidden_states[i] of transformers is for layer i; "
    "its output is hidden_states[i + 1]."
)
# Two arrays are alike if they differ by less than that, as a whole, or by a part of what they would
# differ by if they were others.
_ALIKE = 0.1
# How far the mean square of a normalised row may be from 1.
_UNIT = 0.05


@dataclass(frozen=True, eq=False)
class _Normed:
    """RMSNorm of a sum, whose own error goes through it."""

    added: Computable
    weight: NDArray[np.float64]
    eps: float

    def bound(self, formats: Formats) -> Bound:
        """The exact norm of the exact sum, and what rounding of both allows."""
        right = self.added.bound(formats)
        norm = Norm(right.exact, self.weight, self.eps).bound(formats)
        square = np.mean(np.square(right.exact), axis=-1, keepdims=True) + self.eps
        limit, usual = (
            own + self._passed_on(right.exact, off, square)
            for own, off in ((norm.limit, right.limit), (norm.usual, right.usual))
        )
        return Bound(norm.exact, limit, usual)

    def _passed_on(self, x: Float64Array, off: Float64Array, square: Float64Array) -> Float64Array:
        """The error of a norm whose input is off; twice the first order, which is more than all."""
        mean = np.mean(np.abs(x) * off, axis=-1, keepdims=True)
        error = (off + np.abs(x) * mean / square) / np.sqrt(square) * np.abs(self.weight)
        return np.asarray(2 * error)


def _normed_already(residual: Residual, failing: FailingSite) -> Iterator[Computable]:
    config = failing.recorded.config
    if failing.site.name == f"model.layers.{config.num_hidden_layers - 1}":
        yield _Normed(failing, wide(failing.model.weights.norm), config.rms_norm_eps)


def _not_normed_again(norm: Norm, failing: FailingSite) -> Iterator[Formula]:
    """The model's norm skipped, where what goes into it is normalised: its rows have size one."""
    if failing.site.name != "model.norm":
        return
    x, weight = wide(norm.x), wide(norm.weight)
    square = np.mean(np.square(x / weight), axis=-1)
    if (np.abs(square - 1) < _UNIT).all():
        yield Formula(x, np.abs(x), 1)


def _one_late(residual: Residual, failing: FailingSite) -> Iterator[Computable]:
    """What goes into the layer, which the trace has nowhere else."""
    layer = failing.site.layer
    if failing.site.role != "layer" or layer is None:
        return
    if layer == 0:
        if _is_one_too_far(failing, "model.layers.1"):
            yield from _embedded(failing)
        return
    before = f"model.layers.{layer - 1}"
    names = (before, f"{before}.attention_residual", f"{before}.mlp.down_proj")
    stated, x, added = map(failing.array, names)
    # A port that leaves the layer out has the same array in both.
    if stated is None or x is None or added is None or np.array_equal(stated, failing.computed):
        return
    yield Residual(x, added)


def _is_one_too_far(failing: FailingSite, following: str) -> bool:
    """Whether another site has what should be here."""
    there, right = failing.array(following), failing.bound(failing.formats).exact
    if there is None:
        return False
    return distance(right, there) < _ALIKE * distance(right, failing.computed)


def _embedded(failing: FailingSite) -> Iterator[Computable]:
    rows, ids = failing.array("model.embed_tokens"), failing.recorded.input_ids
    if rows is not None:
        yield Formula(wide(rows), np.abs(wide(rows)), 0)
    elif ids is not None:
        yield Embedding(ids, to_numpy(failing.model.weights.embed_tokens))


def are_late(recorded: Recorded, model: Llama) -> bool:
    """Whether the first layer has the embedding's rows for its output."""
    if "model.layers.0" not in recorded.arrays:
        return False
    if "model.embed_tokens" in recorded.arrays:
        rows = recorded.array("model.embed_tokens")
    elif recorded.input_ids is not None:
        rows = to_numpy(model.weights.embed_tokens)[recorded.input_ids]
    else:
        return False
    return distance(rows, recorded.array("model.layers.0")) < _ALIKE**2


HYPOTHESES = (
    Hypothesis(
        NORMED,
        Residual,
        _normed_already,
        "The array is the output of the last layer after model.norm, as the last of transformers' "
        "hidden_states is; write it as model.norm.",
    ),
    Hypothesis(
        NORMED,
        Norm,
        _not_normed_again,
        "What the last layer is said to give is normalised already, as the last of transformers' "
        "hidden_states is, and is not normalised again.",
    ),
    Hypothesis(LATE, Residual, _one_late, DETAIL),
)
