"""Mistakes in where norms stand: before or after a block, before or after RoPE, over one head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.sites import sites
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.registry import Changed, Computed, evaluated, mistake
from llama_layers.verify.mistakes.streams import normed, norms_of_layer
from llama_layers.verify.operations import Linear, Norm, Rope
from llama_layers.verify.rotation import Rotation
from llama_layers.verify.tracked import Tracked, read

_AFTER = ("post_self_attn_layernorm", "post_mlp_layernorm")
_OF_HEADS = ("self_attn.q_norm", "self_attn.k_norm")


@mistake(Norm, "norm of the sum", roles=_AFTER)
def _(norm: Norm, at: FailingSite) -> Computed | None:
    """Adds to the residual stream before it normalises; it should normalise what it adds."""
    sums = (site for site in sites(at.config) if at.site.name in site.routes[0])
    stream = at.array(next(sums).routes[0][0])
    if stream is None:
        return None
    return evaluated(
        norm, lambda n, x: Norm.formula(replace(n, x=read("x", x, n.x.how) + n.x)), stream
    )


@mistake(Linear, "input normalised")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Normalises its input, {0}; it should take the residual stream as it is."""
    before = at.input_site(0)
    if at.site.layer is None or before is None or before.operation not in ("residual", "embedding"):
        return
    for weight, said in norms_of_layer(at):
        yield (
            evaluated(
                linear, lambda p, w: Linear.formula(replace(p, x=normed(p.x, w, at))), weight
            ),
            said,
        )


@mistake(Norm, "norm over the wrong width", roles=_OF_HEADS)
def _(norm: Norm, at: FailingSite) -> Computed | None:
    """Takes one mean square for all heads of a token; it should take one for each head."""
    if norm.x.ndim != 4:
        return None

    def formula(n: Norm[Tracked]) -> Tracked:
        square = (n.x * n.x).mean().mean(axis=-2)
        return n.x * (square + n.eps).rsqrt() * n.weight

    return evaluated(norm, formula)


@mistake(Norm, "norm after RoPE", roles=_OF_HEADS)
def _(norm: Norm, at: FailingSite) -> Computed | None:
    """Rotates queries and keys before it normalises them; it should normalise them first."""
    assert at.site.layer is not None  # heads are inside a layer
    config = at.config.rope_of(at.site.layer)
    if at.config.qk_norm_after_rope or config is None:
        return None
    heads = norm.x.reshape(*norm.x.shape[:2], -1, config.head_dim)
    rope = Rope(heads, at.recorded.positions, config)

    def formula(r: Rotation) -> Tracked:
        x = Rope.formula(r).moved(lambda y: y.reshape(norm.x.shape))
        return normed(x, norm.weight, at)

    return evaluated(rope, formula)


@mistake(Rope, "norm before RoPE")
def _(rope: Rope, at: FailingSite) -> Computed | None:
    """Normalises queries and keys before it rotates them; it should rotate them first."""
    if not at.config.qk_norm_after_rope or at.config.qk_norm != "head":
        return None
    assert at.site.layer is not None  # heads are inside a layer
    attention = at.model.weights.layers[at.site.layer].self_attn
    weight = attention.q_norm if at.site.role == "self_attn.q_rope" else attention.k_norm
    ones = np.ones(at.config.head_dim, np.float32)
    numbers = ones if weight is None else to_numpy(weight)

    def formula(r: Rotation) -> Tracked:
        return Rope.formula(replace(r, x=normed(r.x, numbers, at)))

    return evaluated(rope, formula)
