"""Mistakes in rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.layers.rope import inv_freq
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.mistakes.registry import Changed, Computed, evaluated, mistake, moved
from llama_layers.verify.operations import Rope
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.rotation import Rotation
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked, read

_THETAS = (1e4, 5e5, 1e6, 1e5, 2.5e5, 5e6, 1e7)
# In a frequency and its product with a position, for any theta up to 1e7; see `rope_phases`.
_ROUNDINGS_OF_PHASES = 64


def omega_of(rope: Rope) -> Float64Array:
    """The frequencies [D / 2]."""
    return inv_freq(rope.config, length=int(rope.positions.max()) + 1)


def rotated(r: Rotation, cos: Tracked, sin: Tracked) -> Tracked:
    """The pairs, rotated by any cosines and sines."""
    a, b = r.pairs
    return r.joined(r.plus(a * cos, -b * sin), r.plus(b * cos, a * sin))


def by_phases(rope: Rope, phases: Float64Array, factor: float | None = None) -> Computed:
    """A rotation by any phases [..., S or 1, heads or 1, D / 2]."""

    def formula(r: Rotation) -> Tracked:
        off = _ROUNDINGS_OF_PHASES * np.abs(phases) * r.x.how.phases.unit_roundoff
        other = replace(r, phases=phases, off=off, factor=r.factor if factor is None else factor)
        return Rope.formula(other)

    return evaluated(rope, formula)


@mistake(Rope, "RoPE layout interleaved", common=1)
def _(rope: Rope, at: FailingSite) -> Rope | None:
    """Pairs channels 2i and 2i + 1; it should pair i and i + D / 2, as this checkpoint does."""
    return replace(rope, layout="interleaved") if rope.layout == "half" else None


@mistake(Rope, "RoPE pairs put back in the other layout")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Puts pairs of channels back in another layout than it takes them in."""
    halves = np.arange(rope.x.shape[-1]).reshape(-1, 2).T.ravel()  # 0, 2, 4 ... 1, 3, 5 ...
    yield moved(replace(rope, layout="interleaved"), lambda y: y[..., halves])
    yield moved(rope, lambda y: y[..., np.argsort(halves)])


@mistake(Rope, "RoPE rotated the other way", common=1)
def _(r: Rotation) -> Tracked:
    """Rotates by minus the phase, with the wrong sign of the sine; it should rotate by the
    phase."""
    return Rope.formula(replace(r, phases=-r.phases))


@mistake(Rope, "RoPE without a minus sign")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Adds both products with the sine; it should subtract the first, as in [-b, a]."""

    def formula(r: Rotation) -> Tracked:
        (a, b), (cos, sin) = r.pairs, r.table
        return r.joined(r.plus(a * cos, b * sin), r.plus(b * cos, a * sin))

    yield evaluated(replace(rope, layout="half"), formula)
    yield evaluated(replace(rope, layout="interleaved"), formula)


@mistake(Rope, "RoPE table in the other layout")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Has the angles of {0} in its table, and takes pairs {1}; it should lay out both alike."""
    half = rope.x.shape[-1] // 2
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


@mistake(Rope, "another rope_theta", common=3)
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Computes with rope_theta {0:g}; it should take this model's, {1:g}."""
    right = rope.config.rope_theta
    for theta in _THETAS:
        if theta != right:
            yield replace(rope, config=replace(rope.config, rope_theta=theta)), theta, right


@mistake(Rope, "RoPE exponent")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Takes theta to the power of {0} / D; it should take it to the power of -2i / D."""
    for power, said in ((2.0, "-4i"), (0.5, "-i")):
        theta = rope.config.rope_theta**power
        yield replace(rope, config=replace(rope.config, rope_theta=theta)), said


@mistake(Rope, "RoPE position off by one")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Rotates each token by a position one too {0}."""
    positions, omega = rope.positions[..., None, None], omega_of(rope)
    yield by_phases(rope, (positions + 1) * omega), "high"
    yield by_phases(rope, (positions - 1) * omega), "low"


@mistake(Rope, "padding counted in positions")
def _(rope: Rope, at: FailingSite) -> Rope | None:
    """Counts positions from the start of the batch; it should count them from the first token
    that is not padding."""
    if at.recorded.keep is None:
        return None
    return replace(rope, positions=np.arange(at.recorded.count))


@mistake(Rope, "RoPE by head")
def _(rope: Rope, at: FailingSite) -> Computed:
    """Rotates by the number of the head; it should rotate by the token's position."""
    heads = np.arange(rope.x.shape[2])[None, None, :, None]
    return by_phases(rope, heads * inv_freq(rope.config))


def _scaled(rope: Rope, scaling: RopeScaling | None) -> Rope:
    return replace(rope, config=replace(rope.config, rope_scaling=scaling))


@mistake(Rope, "RoPE scaling ignored", common=1)
def _(rope: Rope, at: FailingSite) -> Rope | None:
    """Computes plain frequencies; it should scale them as rope_scaling says."""
    return None if rope.config.rope_scaling is None else _scaled(rope, None)


@mistake(Rope, "RoPE scaling of another kind")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Scales frequencies as rope_type {0!r} does, with the same factor; it should scale them as
    {1!r} does."""
    scaling = rope.config.rope_scaling
    if scaling is None or scaling.factor == 1:
        return
    stretched = int(rope.positions.max()) >= rope.config.max_position_embeddings
    for kind in ("linear", "dynamic", "yarn") if stretched else ("linear", "yarn"):
        if kind != scaling.rope_type:
            other = RopeScaling(kind, factor=scaling.factor)
            yield _scaled(rope, other), kind, scaling.rope_type


@mistake(Rope, "another parameter of RoPE scaling")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Computes with {0} in rope_scaling; it should compute with {1}."""
    scaling, length = rope.config.rope_scaling, rope.config.max_position_embeddings
    if scaling is None:
        return
    for change in _parameters(scaling, length):
        if any(getattr(scaling, name) != value for name, value in change.items()):
            said = " and ".join(f"{name} {value}" for name, value in change.items())
            right = " and ".join(str(getattr(scaling, name)) for name in change)
            yield _scaled(rope, replace(scaling, **change)), said, right


def _parameters(scaling: RopeScaling, length: int) -> Iterator[dict[str, Any]]:
    """Parameters that are mistaken for others."""
    if scaling.rope_type in ("yarn", "llama3"):
        yield {"original_max_position_embeddings": length}
        yield {"original_max_position_embeddings": int(length * scaling.factor)}
    if scaling.rope_type == "yarn":
        yield {"truncate": scaling.truncate is False}
        yield {"beta_fast": scaling.beta_slow or 1.0, "beta_slow": scaling.beta_fast or 32.0}
        yield {"mscale": None, "mscale_all_dim": None}
        yield {"attention_factor": None}


@mistake(Rope, "RoPE scaling factor inverted")
def _(rope: Rope, at: FailingSite) -> Computed | None:
    """Multiplies frequencies by the scaling factor; it should divide by it."""
    scaling = rope.config.rope_scaling
    if scaling is None:
        return None
    plain = omega_of(_scaled(rope, None)) * scaling.factor
    return by_phases(rope, rope.positions[..., None, None] * plain)


@mistake(Rope, "attention factor of yarn missing")
def _(r: Rotation) -> Tracked:
    """Rotates without yarn's attention factor; it should multiply cosines and sines by it."""
    return Rope.formula(replace(r, factor=1.0))


@mistake(Rope, "attention factor of yarn misused")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Applies yarn's attention factor to cosines or sines only, or to another power; it should
    multiply both by it, once."""
    for power in (2, 0.5, -1):
        yield evaluated(rope, lambda r, n: Rope.formula(replace(r, factor=r.factor**n)), power)
    yield evaluated(rope, lambda r: rotated(r, r.table[0], r.table[1] / r.factor))
    yield evaluated(rope, lambda r: rotated(r, r.table[0] / r.factor, r.table[1]))


@mistake(Rope, "RoPE not applied", common=1)
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Leaves queries or keys as they are; it should rotate them."""
    still = np.zeros((1, 1, 1, rope.x.shape[-1] // 2))
    yield by_phases(rope, still, 1.0)
    yield by_phases(rope, still)


@mistake(Rope, "RoPE applied twice")
def _(r: Rotation) -> Tracked:
    """Rotates twice; it should rotate once."""
    return Rope.formula(replace(r, x=Rope.formula(r).to(r.x.how.out)))


@mistake(Rope, "RoPE cosine and sine swapped")
def _(r: Rotation) -> Tracked:
    """Takes cosines for sines and sines for cosines."""
    return rotated(r, *r.table[::-1])


@mistake(Rope, "RoPE on half of the channels")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Rotates half of the channels only; it should rotate all."""
    # One result of each pair is left as it was, or half of all pairs is.
    dim = rope.x.shape[-1]
    place, half = np.arange(dim), dim // 2
    for kept in (place >= half, place % half >= half // 2):
        yield evaluated(rope, lambda r, kept: r.x.where(kept, Rope.formula(r)), kept)
        yield evaluated(rope, lambda r, kept: r.x.where(~kept, Rope.formula(r)), kept)


@mistake(Rope, "partial RoPE")
def _(rope: Rope, at: FailingSite) -> Computed | None:
    """Rotates the first half of a head by itself; it should rotate pairs i and i + D / 2 of the
    whole head."""
    # The first D / 2 channels are rotated among themselves.
    half = rope.x.shape[-1] // 2
    if half % 2:
        return None
    first = replace(rope, x=rope.x[..., :half], config=replace(rope.config, head_dim=half))

    def bound(how: Rounding) -> Bound:
        a, b = first.bound(how), read("x", rope.x[..., half:], how).bound()
        parts = ((a.exact, b.exact), (a.limit, b.limit), (a.usual, b.usual))
        shape = b.exact.shape
        return Bound(*(np.concatenate([p, np.broadcast_to(q, shape)], axis=-1) for p, q in parts))

    return Computed(bound)
