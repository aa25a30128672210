"""Outputs of layers as transformers' output_hidden_states counts them.

For L layers it gives L + 1 arrays: what goes into each layer, and the last one's output after the
model's norm.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.sites import sites
from llama_layers.model.llama import Llama
from llama_layers.verify.distance import distance
from llama_layers.verify.failing_site import Computable, FailingSite, wide
from llama_layers.verify.mistakes.registry import Computed, evaluated, mistake
from llama_layers.verify.operations import Embedding, Norm, Residual
from llama_layers.verify.tracked import Tracked, read
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


@mistake(
    Residual,
    NORMED,
    says="The array is the output of the last layer after model.norm, as the last of transformers' "
    "hidden_states is; write it as model.norm.",
    roles=("layer",),
)
def _(residual: Residual, at: FailingSite) -> Computable | None:
    if at.site.layer != at.config.num_hidden_layers - 1:
        return None
    weight, eps = to_numpy(at.model.weights.norm), at.config.rms_norm_eps

    def formula(r: Residual[Tracked]) -> Tracked:
        scale = read("weight", weight, r.x.how, recorded=False)
        offset = at.config.norm_weight_offset
        scale = scale + offset if offset else scale
        return Norm.formula(Norm(Residual.formula(r), scale, eps))

    return evaluated(residual, formula)


@mistake(
    Norm,
    NORMED,
    says="The output of the last layer is normalised already, as the last of transformers' "
    "hidden_states is, and is not normalised again.",
    roles=("model.norm",),
)
def _(norm: Norm, at: FailingSite) -> Computable | None:
    """The model's norm skipped, where what goes into it is normalised: its rows have size one."""
    square = np.mean(np.square(wide(norm.x) / norm.scale), axis=-1)
    alike = (np.abs(square - 1) < _UNIT).all()
    return evaluated(norm, lambda n: n.x) if alike else None


@mistake(Residual, LATE, says=DETAIL, roles=("layer",))
def _(residual: Residual, at: FailingSite) -> Iterator[Computable]:
    """The input of the layer, which the trace has nowhere else."""
    layer = at.site.layer
    if at.site.name not in at.recorded.arrays:
        return
    if not layer:
        if _is_one_too_far(at, "model.layers.1"):
            yield from _embedded(at)
        return
    before = f"model.layers.{layer - 1}"
    (routes,) = (site.routes for site in sites(at.config) if site.name == before)
    stated, x, added = map(at.array, (before, *routes[0]))
    # A port that leaves the layer out has the same array in both.
    if stated is None or x is None or added is None or np.array_equal(stated, at.computed):
        return
    yield Residual(x, added)


def _is_one_too_far(at: FailingSite, following: str) -> bool:
    """Whether another site has what should be here."""
    there, right = at.array(following), at.bound(at.formats).exact
    return there is not None and distance(right, there) < _ALIKE * distance(right, at.computed)


def _embedded(at: FailingSite) -> Iterator[Computable]:
    rows, ids = at.array("model.embed_tokens"), at.recorded.input_ids
    if rows is not None:
        yield Computed(lambda how: read("rows", rows, how, recorded=False).bound())
    elif ids is not None:
        yield Embedding(ids, to_numpy(at.model.weights.embed_tokens))


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
