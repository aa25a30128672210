"""Mistakes in RMSNorm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.families import FAMILIES, module_name
from llama_layers.layers.weights import LayerWeights
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.predicted import rounded
from llama_layers.verify.mistakes.registry import Changed, Kind, by_token, mistake
from llama_layers.verify.mistakes.rounding import in_each_narrow_format, narrowed
from llama_layers.verify.operations import Norm
from llama_layers.verify.tracked import Tracked

_EPS = (1e-5, 1e-6, 1e-8, 0.0)
# What kernels pad rows to a multiple of.
_PADDED = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def _square(n: Norm[Tracked]) -> Tracked:
    """The mean square of each row."""
    return (n.x * n.x).mean()


@mistake(Norm, "another eps", common=2)
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Adds an eps of {0:g}; it should add {1:g}."""
    yield from ((replace(norm, eps=eps), eps, norm.eps) for eps in _EPS if eps != norm.eps)


@mistake(Norm, "another eps", kind=Kind.SOLVED)
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Adds an eps of {0:g}; it should add {1:g}."""
    # Solved for in the token with the least mean square, and held against the others.
    square = np.mean(np.square(wide(norm.x)), axis=-1)
    normed = wide(norm.x) * norm.scale
    with np.errstate(all="ignore"):
        factor = np.sum(wide(at.computed) * normed, axis=-1) / np.sum(np.square(normed), axis=-1)
        found = float((factor**-2.0 - square).ravel()[np.argmin(square)])
    if found > 0 and np.isfinite(found):
        for eps in dict.fromkeys((float(f"{found:.1g}"), float(f"{found:.3g}"), found)):
            yield replace(norm, eps=eps), eps, norm.eps


@mistake(Norm, "eps outside the root")
def _(n: Norm[Tracked]) -> Tracked:
    """Adds eps to the root; it should add it to the mean square, under it."""
    return n.x / (_square(n).sqrt() + n.eps) * n.weight


@mistake(Norm, "norm weight plus one", common=1)
def _(norm: Norm, at: FailingSite) -> Changed:
    """Scales with the weight plus {0:g}; it should scale with the weight{1}."""
    offset = norm.offset
    should = " plus 1" if offset else ", to which Gemma alone adds 1"
    return replace(norm, offset=offset + 1), offset + 1, should


@mistake(Norm, "norm weight without its plus one", common=1)
def _(norm: Norm, at: FailingSite) -> Changed | None:
    """Scales with the weight; it should scale with the weight plus 1, as Gemma does."""
    return replace(norm, offset=0.0) if norm.offset else None


@in_each_narrow_format
def _weight_in(narrow: str) -> None:
    @mistake(
        Norm,
        f"norm weight plus one in {narrow}",
        kind=Kind.ROUNDING,
        says=f"Rounds the weight plus {{0:g}} to {narrow}; it should keep the sum in float32.",
    )
    def _(norm: Norm, at: FailingSite) -> Changed | None:
        if not norm.offset:
            return None
        weight = narrowed(wide(norm.weight) + norm.offset, narrow)
        return replace(norm, weight=weight, offset=0.0), norm.offset


@mistake(Norm, "norm weight skipped", common=1, parts=True)
def _(norm: Norm, at: FailingSite) -> Norm:
    """Normalises without scaling; it should scale with the weight, too."""
    return replace(norm, weight=np.ones_like(norm.weight), offset=0.0)


def _norms(layer: LayerWeights) -> dict[str, Array]:
    """The weights of a layer's norms, those of queries and keys too, by role."""
    heads = {f"self_attn.{n}": getattr(layer.self_attn, n) for n in ("q_norm", "k_norm")}
    return layer.norms() | {role: weight for role, weight in heads.items() if weight is not None}


@mistake(Norm, "another layer's weights")
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Has the weights of layer {0}; it should have those of layer {1}."""
    for index, layer in enumerate(at.model.weights.layers):
        weight = _norms(layer).get(at.site.role)
        if weight is not None and index != at.site.layer:
            yield replace(norm, weight=to_numpy(weight)), index, at.site.layer


@mistake(Norm, "another norm's weight")
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Scales with the weight of {0}; it should scale with that of {1}."""
    weights = {("norm", "model.norm"): at.model.weights.norm}
    for index, layer in enumerate(at.model.weights.layers):
        for role, weight in _norms(layer).items():
            name = f"model.layers.{index}.{module_name(at.config.model_type, role)}"
            weights[role, name] = weight
    for (role, name), weight in weights.items():
        if role != at.site.role and weight.shape == norm.weight.shape:
            yield replace(norm, weight=to_numpy(weight)), name, at.site.name


@mistake(Norm, "mean subtracted")
def _(n: Norm[Tracked]) -> Tracked:
    """Subtracts the mean, as LayerNorm does; it should divide by the root of the mean square
    only."""
    centred = n.x - n.x.mean()
    return centred * ((centred * centred).mean() + n.eps).rsqrt() * n.weight


@mistake(Norm, "mean subtracted")
def _(n: Norm[Tracked]) -> Tracked:
    """Divides by the standard deviation, as LayerNorm does; it should divide by the root of the
    mean square."""
    centred = n.x - n.x.mean()
    return n.x * ((centred * centred).mean() + n.eps).rsqrt() * n.weight


@mistake(Norm, "sum instead of the mean")
def _(n: Norm[Tracked]) -> Tracked:
    """Divides by the root of the sum of squares; it should divide by the root of their mean."""
    return n.x * ((n.x * n.x).sum() + n.eps).rsqrt() * n.weight


@mistake(Norm, "mean over one less")
def _(n: Norm[Tracked]) -> Tracked:
    """Divides the sum of squares by H - 1; it should use H."""
    return n.x * ((n.x * n.x).sum() / max(n.x.shape[-1] - 1, 1) + n.eps).rsqrt() * n.weight


@mistake(Norm, "mean over another width")
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Divides the sum of squares by {0}; it should divide by the width, {1}."""
    width, config = norm.x.shape[-1], at.config
    others = [-(-width // multiple) * multiple for multiple in _PADDED]
    others += [1 << (width - 1).bit_length(), width // 2, config.head_dim]
    others += [config.intermediate_size, config.num_attention_heads * config.head_dim]
    others = [n for n in dict.fromkeys(others) if n not in (0, 1, width)]
    for other in others if (at.ratio > 1).any() else others[:3]:

        def formula(n: Norm[Tracked], by: float = float(other)) -> Tracked:
            return n.x * ((n.x * n.x).sum() / by + n.eps).rsqrt() * n.weight

        yield by_token(norm, formula), other, width


@mistake(Norm, "mean of magnitudes")
def _(n: Norm[Tracked]) -> Tracked:
    """Divides by the mean magnitude; it should divide by the root of the mean square."""
    return n.x / (n.x.apply(np.abs).mean() + n.eps) * n.weight


@mistake(Norm, "largest magnitude for the root mean square")
def _(n: Norm[Tracked]) -> Tracked:
    """Divides by the largest magnitude; it should divide by the root of the mean square."""
    return n.x / (n.x.apply(np.abs).max() + n.eps) * n.weight


@mistake(Norm, "root forgotten")
def _(n: Norm[Tracked]) -> Tracked:
    """Divides by the mean square; it should divide by its root."""
    return n.x / (_square(n) + n.eps) * n.weight


@mistake(Norm, "normalised over several tokens", mixes=True)
def _(n: Norm[Tracked]) -> Tracked:
    """Takes one mean square for several tokens; it should take one for each."""
    return n.x * (_square(n).mean(axis=1) + n.eps).rsqrt() * n.weight


@mistake(Norm, "normalised over several tokens", mixes=True)
def _(n: Norm[Tracked]) -> Tracked:
    """Takes one mean square for all sequences; it should take one for each token."""
    return n.x * (_square(n).mean(axis=1).mean(axis=0) + n.eps).rsqrt() * n.weight


@mistake(Norm, "norm skipped")
def _(n: Norm[Tracked]) -> Tracked:
    """Passes its input on; it should normalise it and scale it."""
    return n.x


@mistake(Norm, "weight without the norm")
def _(n: Norm[Tracked]) -> Tracked:
    """Scales with the weight without normalising; it should do both."""
    return n.x * n.weight


@in_each_narrow_format
def _computed_in(narrow: str) -> None:
    form = FLOATS[narrow]

    @mistake(
        Norm,
        f"norm computed in {narrow}",
        kind=Kind.ROUNDING,
        says=f"Rounds {{0}} to {narrow}; it should keep float32 to the end.",
    )
    def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
        def formula(n: Norm[Tracked], squares: bool, factor: bool, row: bool) -> Tracked:
            square = rounded(n.x * n.x, form) if squares else n.x * n.x
            mean = square.mean()
            scale = ((rounded(mean, form) if squares else mean) + n.eps).rsqrt()
            y = n.x * (rounded(scale, form) if factor else scale)
            return (rounded(y, form) if row else y) * n.weight

        yield by_token(norm, formula, True, True, True), "each of its steps"
        yield by_token(norm, formula, False, True, True), "the inverse root and its product"
        yield by_token(norm, formula, False, True, False), "the inverse root"
        # Where a class of transformers rounds it, it is a habit of an engine. In more bits than the
        # result has, it would change next to nothing, and explain what it does not.
        usual = FAMILIES[at.config.model_type].rounds_before_weight
        if form.precision <= at.formats.out.precision and (not usual or narrow != at.formats.dtype):
            yield by_token(norm, formula, False, False, True), "the normalised row"


@mistake(Norm, "another token's norm", roles=("model.norm",))
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Goes on with token {0}; it should go on with the last."""
    # Where only the last token was kept: one of the others in its place.
    stream = at.recorded.array(at.site.routes[0][0])
    if norm.x.shape[1] == 1:
        for token in range(stream.shape[1] - 1):
            yield replace(norm, x=stream[:, token : token + 1]), token


@mistake(Norm, "input from the wrong place")
def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
    """Normalises the array of {0}; it should normalise that of {1}."""
    for name, x in at.streams(norm.x.shape):
        yield replace(norm, x=x), name, at.site.routes[0][0]
