"""Mistakes in which channels RoPE rotates, and in which of them are a pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.fit import in_halves
from llama_layers.verify.mistakes.registry import Changed, evaluated, mistake, moved
from llama_layers.verify.operations import Rope
from llama_layers.verify.rotation import Rotation
from llama_layers.verify.tracked import Tracked

Layout = Literal["half", "interleaved"]


def _interleaved(at: FailingSite) -> bool:
    """Whether the port has the channels of a pair next to each other; here they never are."""
    return at.recorded.metadata.get("rope_layout") == "interleaved"


def _as_stored(rope: Rope, at: FailingSite, layout: Layout, config: LlamaConfig) -> Computable:
    """A rotation with another layout or config, of channels in the order that the port has."""
    if not _interleaved(at):
        return replace(rope, layout=layout, config=config)
    order = in_halves(np.arange(rope.x.shape[-1])[None, None], rope.config).ravel()
    stored = rope.x[..., np.argsort(order)]
    return moved(replace(rope, x=stored, layout=layout, config=config), lambda y: y[..., order])


@mistake(Rope, "RoPE layout interleaved", common=1)
def _(rope: Rope, at: FailingSite) -> Rope | None:
    """Pairs channels 2i and 2i + 1; it should pair i and i + D / 2, as this checkpoint does."""
    return None if _interleaved(at) else replace(rope, layout="interleaved")


@mistake(Rope, "RoPE layout half")
def _(rope: Rope, at: FailingSite) -> Computable | None:
    """Pairs channels i and i + D / 2; it should pair 2i and 2i + 1, as this checkpoint does."""
    return _as_stored(rope, at, "half", rope.config) if _interleaved(at) else None


@mistake(Rope, "RoPE pairs put back in the other layout")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Puts pairs of channels back in another layout than it takes them in."""
    channels, width = np.arange(rope.x.shape[-1]), rope.config.rotary_dim
    halves = channels[:width].reshape(-1, 2).T.ravel()  # 0, 2, 4 ... 1, 3, 5 ...
    halves = np.concatenate([halves, channels[width:]])
    yield moved(replace(rope, layout="interleaved"), lambda y: y[..., halves])
    yield moved(rope, lambda y: y[..., np.argsort(halves)])


@mistake(Rope, "RoPE table in the other layout")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Has the angles of {0} in its table, and takes pairs {1}; it should lay out both alike."""
    half = rope.config.rotary_dim // 2
    places = np.arange(half)
    by_half = (places // 2, (places + half) // 2)
    by_two = (2 * places % half, (2 * places + 1) % half)
    halves, twos = "i and i + D / 2", "2i and 2i + 1"

    def formula(r: Rotation, one: NDArray[np.intp], other: NDArray[np.intp]) -> Tracked:
        (a, b), (cos, sin) = r.pairs, r.table
        first = r.plus(a * cos[..., one], -b * sin[..., one])
        return r.joined(first, r.plus(b * cos[..., other], a * sin[..., other]))

    yield evaluated(replace(rope, layout="half"), formula, *by_half), twos, halves
    yield evaluated(replace(rope, layout="interleaved"), formula, *by_two), halves, twos


@mistake(Rope, "RoPE on half of the channels")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Rotates half of the channels only; it should rotate all."""
    # One result of each pair is left as it was, or half of all pairs is.
    place, half = np.arange(rope.x.shape[-1]), rope.config.rotary_dim // 2
    for kept in (place >= half, place % half >= half // 2):
        yield evaluated(rope, lambda r, kept: r.x.where(kept, Rope.formula(r)), kept)
        yield evaluated(rope, lambda r, kept: r.x.where(~kept, Rope.formula(r)), kept)


@mistake(Rope, "partial RoPE")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Rotates the first {0} channels of a head by themselves; it should rotate {1}."""
    config, dim = rope.config, rope.x.shape[-1]
    if config.rope_scaling is not None and config.rope_scaling.short_factor is not None:
        return  # which has a number for each pair
    own: Layout = "interleaved" if _interleaved(at) else rope.layout
    right = f"the first {config.rotary_dim}" if config.rotary_dim < dim else f"all {dim}"
    for part in (0.5, 1.0, 0.25, 0.75):
        width = int(dim * part)
        if width != config.rotary_dim and width and not width % 2:
            other = replace(config, partial_rotary_factor=part)
            yield _as_stored(rope, at, own, other), width, right
