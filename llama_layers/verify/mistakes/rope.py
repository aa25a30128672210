"""Mistakes in rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from llama_layers.config.rope_layers import RopeKind
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.layers.rope import inv_freq
from llama_layers.layers.temperature import temperatures, trained_context
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, evaluated, mistake
from llama_layers.verify.operations import Copy, Rope
from llama_layers.verify.rotation import Rotation
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

_THETAS = (1e4, 5e5, 1e6, 1e5, 2.5e5, 5e6, 1e7)
# In a frequency and its product with a position, for any theta up to 1e7; see `rope_phases`.
_ROUNDINGS_OF_PHASES = 64


def omega_of(rope: Rope) -> Float64Array:
    """The frequencies [R / 2]."""
    return inv_freq(rope.config, length=int(rope.positions.max()) + 1)


def rotated(r: Rotation, cos: Tracked, sin: Tracked) -> Tracked:
    """The pairs, rotated by any cosines and sines."""
    a, b = r.pairs
    return r.joined(r.plus(a * cos, -b * sin), r.plus(b * cos, a * sin))


def by_phases(
    rope: Rope,
    phases: Float64Array,
    factor: float | None = None,
    unsure: Float64Array | float = 0.0,
) -> Computed:
    """A rotation by any phases [..., S or 1, heads or 1, R / 2], which may be off by `unsure`."""

    def formula(r: Rotation) -> Tracked:
        off = _ROUNDINGS_OF_PHASES * np.abs(phases) * r.x.how.phases.unit_roundoff + unsure
        other = replace(r, phases=phases, off=off, factor=r.factor if factor is None else factor)
        return Rope.formula(other)

    return evaluated(rope, formula)


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


@mistake(Rope, "another rope_theta", common=3)
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Computes with rope_theta {0:g}; it should take this model's, {1:g}."""
    right, others = rope.config.rope_theta, {kind.theta for kind in _other_kinds(rope, at)}
    for theta in _THETAS:
        if theta != right and theta not in others:
            yield replace(rope, config=replace(rope.config, rope_theta=theta)), theta, right


def _other_kinds(rope: Rope, at: FailingSite) -> list[RopeKind]:
    """The kinds of RoPE that layers have, but for that of this one."""
    assert at.site.layer is not None  # RoPE is inside a layer
    own, kinds = at.config.rope_kinds[at.site.layer], dict.fromkeys(at.config.rope_kinds)
    return [kind for kind in kinds if kind is not None and kind != own]


@mistake(Rope, "RoPE of another layer", common=2)
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Computes RoPE as in other layers, with rope_theta {0:g}{1}; it should take this layer's,
    {2:g}{3}."""
    own = at.config.rope_kinds[at.site.layer or 0]
    assert own is not None  # or it is not rotated
    for kind in _other_kinds(rope, at):
        if kind.theta == own.theta and own.scaled:
            continue  # which ignores the scaling
        words = [
            "" if kind.scaled == own.scaled else " and rope_scaling" if k.scaled else " alone"
            for k in (kind, own)
        ]
        other = replace(rope, config=at.config.with_rope(kind))
        yield other, kind.theta, words[0], own.theta, words[1]


@mistake(Rope, "RoPE scaling of another layer", common=1)
def _(rope: Rope, at: FailingSite) -> Rope | None:
    """Scales frequencies by rope_scaling, as in other layers; it should leave them as they are in
    this layer."""
    scaling = at.config.rope_scaling
    alike = any(kind.theta == rope.config.rope_theta for kind in _other_kinds(rope, at))
    if scaling is None or rope.config.rope_scaling is not None or alike:
        return None  # what is alike but for the scaling is RoPE of another layer
    return _scaled(rope, scaling)


@mistake(Copy, "RoPE on a layer without it", common=2)
def _(copied: Copy, at: FailingSite) -> Iterator[Changed]:
    """Rotates queries or keys, with rope_theta {0:g}; it should leave them as they are in this
    layer."""
    kinds = [kind for kind in dict.fromkeys(at.config.rope_kinds) if kind is not None]
    kinds.append(RopeKind(at.config.rope_theta, scaled=False))
    for kind in dict.fromkeys(kinds):
        config = at.config.with_rope(kind)
        yield Rope(copied.x, at.recorded.positions, config), kind.theta


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
    return by_phases(rope, heads * omega_of(rope))


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
        if kind != scaling.rope_type and (kind != "yarn" or rope.config.rope_theta != 1):
            other = RopeScaling(kind, factor=scaling.factor)
            yield _scaled(rope, other), kind, scaling.rope_type


@mistake(Rope, "RoPE scaling of another kind")
def _(rope: Rope, at: FailingSite) -> Computed | None:
    """Raises rope_theta by the factor to the power of D / (D - 2) (NTK); it should scale
    frequencies as rope_scaling says."""
    scaling, dim = rope.config.rope_scaling, rope.config.head_dim
    if scaling is None or scaling.factor == 1 or dim == 2:
        return None
    theta = rope.config.rope_theta * scaling.factor ** (dim / (dim - 2))
    other = replace(rope.config, rope_theta=theta, rope_scaling=None)
    return by_phases(rope, rope.positions[..., None, None] * inv_freq(other))


@mistake(Rope, "another ramp of RoPE scaling")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Blends kept and scaled frequencies {0}; it should blend them as rope_type {1!r} does."""
    scaling = rope.config.rope_scaling
    if scaling is None or scaling.rope_type not in ("llama3", "yarn") or scaling.factor == 1:
        return
    plain = omega_of(_scaled(rope, None))
    low = plain / scaling.factor
    kept = np.clip((omega_of(rope) - low) / (plain - low), 0.0, 1.0)
    kept = np.where(kept < 1e-12, 0.0, np.where(kept > 1 - 1e-12, 1.0, kept))
    inside = (kept > 0) & (kept < 1)
    for other, said in (
        (np.where(inside, 0.0, kept), "nowhere, and scales those between"),
        (np.where(inside, 1.0, kept), "nowhere, and keeps those between"),
        (np.round(kept), "nowhere, and takes the nearer"),
        (np.where(inside, 1 - kept, kept), "the other way between the two limits"),
        (1 - kept, "the other way"),
    ):
        omega = other * plain + (1 - other) * low
        yield by_phases(rope, rope.positions[..., None, None] * omega), said, scaling.rope_type
    omega = 1 / (kept / plain + (1 - kept) / low)
    said = "by their wavelengths"
    yield by_phases(rope, rope.positions[..., None, None] * omega), said, scaling.rope_type


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
    """Rotates without the attention factor of yarn or longrope; it should multiply cosines and
    sines by it."""
    return Rope.formula(replace(r, factor=1.0))


@mistake(Rope, "attention factor of yarn misused")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Applies the attention factor of yarn or longrope to cosines or sines only, or to another
    power; it should multiply both by it, once."""
    for power in (2, 0.5, -1):
        yield evaluated(rope, lambda r, n: Rope.formula(replace(r, factor=r.factor**n)), power)
    yield evaluated(rope, lambda r: rotated(r, r.table[0], r.table[1] / r.factor))
    yield evaluated(rope, lambda r: rotated(r, r.table[0] / r.factor, r.table[1]))


@mistake(Rope, "longrope's factors of another length")
def _(rope: Rope, at: FailingSite) -> Changed | None:
    """Divides frequencies by {0}; with {1} tokens in use it should divide them by {2}."""
    scaling = rope.config.rope_scaling
    if scaling is None or scaling.rope_type != "longrope":
        return None
    swapped = replace(scaling, short_factor=scaling.long_factor, long_factor=scaling.short_factor)
    length, names = int(rope.positions.max()) + 1, ["long_factor", "short_factor"]
    assert scaling.original_max_position_embeddings is not None  # longrope has it
    if length > scaling.original_max_position_embeddings:
        names.reverse()
    return _scaled(rope, swapped), names[0], length, names[1]


@mistake(Rope, "query temperature missing", common=1)
def _(rope: Rope, at: FailingSite) -> Rope | None:
    """Leaves queries as RoPE gives them; it should multiply them with 1 + llama_4_scaling_beta
    log(1 + floor(position / original_max_position_embeddings))."""
    return None if rope.temperature is None else replace(rope, temperature=None)


@mistake(Rope, "query temperature of other positions")
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Multiplies queries with the temperature of {0}; it should take that of their position over
    the trained context."""
    if rope.temperature is None:
        return
    config = at.config
    yield replace(rope, temperature=temperatures(rope.positions + 1, config)), "the position after"
    whole = replace(config, rope_scaling=None, llama_4_scaling_context=None)
    longer = temperatures(rope.positions, whole)
    if (longer > 1).any():
        yield replace(rope, temperature=longer), "their position over max_position_embeddings"
    context = trained_context(config)
    smooth = 1 + config.llama_4_scaling_beta * np.log1p(rope.positions / context)
    yield replace(rope, temperature=smooth), "their position without rounding down"


@mistake(Rope, "query temperature of another beta", kind=Kind.SOLVED)
def _(rope: Rope, at: FailingSite) -> Changed | None:
    """Multiplies queries with the temperature of a llama_4_scaling_beta of {0:.4g}; it should take
    {1:g}."""
    if rope.temperature is None:
        return None
    # In each token the factor that explains it; the betas that explain these, on average.
    right, theirs, axes = at.bound(at.formats).exact, wide(at.computed), (-2, -1)
    size = np.maximum(np.sum(np.square(right), axis=axes), 1e-300)
    more = np.sum(right * theirs, axis=axes) / size * rope.temperature - 1
    own, beta = np.broadcast_to(rope.temperature - 1, more.shape), at.config.llama_4_scaling_beta
    if not (own.any() and np.isfinite(more).all()):
        return None
    times = float(np.sum(own * more) / np.sum(np.square(own)))
    return replace(rope, temperature=1 + times * (rope.temperature - 1)), times * beta, beta


@mistake(Rope, "query temperature on keys", roles=("self_attn.k_rope",))
def _(rope: Rope, at: FailingSite) -> Rope | None:
    """Multiplies keys with the temperature of queries; it should leave them as RoPE gives them."""
    if not at.config.llama_4_scaling_beta:
        return None
    return replace(rope, temperature=temperatures(rope.positions, at.config))


@mistake(Rope, "RoPE not applied", common=1)
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """Leaves queries or keys as they are; it should rotate them."""
    still = np.zeros((1, 1, 1, rope.config.rotary_dim // 2))
    yield by_phases(rope, still, 1.0)
    yield by_phases(rope, still)


@mistake(Rope, "RoPE applied twice")
def _(r: Rotation) -> Tracked:
    """Rotates twice; it should rotate once."""
    once = Rope.formula(replace(r, temperature=None))
    return Rope.formula(replace(r, x=once.to(r.x.how.out)))


@mistake(Rope, "RoPE cosine and sine swapped")
def _(r: Rotation) -> Tracked:
    """Takes cosines for sines and sines for cosines."""
    return rotated(r, *r.table[::-1])
