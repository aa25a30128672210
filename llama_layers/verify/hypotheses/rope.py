"""Mistakes in rotary position embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.layers.rope import attention_factor, inv_freq
from llama_layers.verify.bounds import Bound
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Float64Array,
    Formula,
    Hypothesis,
    Moved,
    wide,
)
from llama_layers.verify.operations import Formats, Rope

_THETAS = (1e4, 5e5, 1e6, 1e5, 2.5e5, 5e6, 1e7)
# In a frequency and its product with a position, for any theta up to 1e7; see `rope_bound`.
_ROUNDINGS_OF_PHASES = 64


@dataclass(frozen=True, eq=False)
class Turn:
    """Pairs of channels i and i + D / 2, multiplied with any cosines and sines.

    The phases, in radians, tell how far off they are if a profile rounds them.
    """

    x: Any
    cos: Float64Array
    sin: Float64Array
    phases: Float64Array

    def bound(self, formats: Formats) -> Bound:
        """The exact products and sums, and what rounding allows."""
        a, b = np.split(wide(self.x), 2, axis=-1)
        exact = np.concatenate([a * self.cos - b * self.sin, b * self.cos + a * self.sin], axis=-1)
        off = np.ones_like(self.phases)
        if formats.profile.phases is not None:
            narrow, sums = (FLOATS[f].unit_roundoff for f in ("float32", formats.accumulate))
            off += _ROUNDINGS_OF_PHASES * np.abs(self.phases) * narrow / sums
        magnitude = (np.abs(a) + np.abs(b)) * np.hypot(self.cos, self.sin) * off
        return Formula(exact, np.concatenate([magnitude, magnitude], axis=-1), 4).bound(formats)


def phases_of(rope: Rope, config: LlamaConfig | None = None) -> Float64Array:
    """The phases [B or 1, S, 1, D / 2] of a rotation."""
    config = config or rope.config
    length = int(rope.positions.max()) + 1
    omega = inv_freq(config, length=length)
    phases: Float64Array = rope.positions[..., None, None] * omega
    return phases if phases.ndim == 4 else phases[None]


def rotate(rope: Rope, phases: Float64Array, factor: float | None = None) -> Turn:
    """A rotation by any phases."""
    factor = attention_factor(rope.config) if factor is None else factor
    return Turn(rope.x, factor * np.cos(phases), factor * np.sin(phases), phases)


def _layout(rope: Rope, failing: FailingSite) -> Iterator[Rope]:
    if rope.layout == "half":
        yield replace(rope, layout="interleaved")


def _put_back_otherwise(rope: Rope, failing: FailingSite) -> Iterator[Moved]:
    dim = rope.x.shape[-1]
    halves = np.arange(dim).reshape(-1, 2).T.ravel()  # 0, 2, 4 ... 1, 3, 5 ...
    pairs = np.argsort(halves)
    yield Moved(replace(rope, layout="interleaved"), lambda y: y[..., halves])
    yield Moved(rope, lambda y: y[..., pairs])


def _other_theta(rope: Rope, failing: FailingSite) -> Iterator[Change]:
    for theta in _THETAS:
        if theta != rope.config.rope_theta:
            yield Change(
                replace(rope, config=replace(rope.config, rope_theta=theta)),
                f"The port seems to compute with rope_theta {theta:g}; this model has "
                f"{rope.config.rope_theta:g}.",
            )


def _exponent(rope: Rope, failing: FailingSite) -> Iterator[Computable]:
    for power in (2.0, 0.5):
        yield replace(rope, config=replace(rope.config, rope_theta=rope.config.rope_theta**power))


def _turned_back(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    yield rotate(rope, -phases_of(rope))


def _off_by_one(rope: Rope, failing: FailingSite) -> Iterator[Change]:
    omega = inv_freq(rope.config, length=int(rope.positions.max()) + 1)
    for step, first in ((1, "one too high"), (-1, "one too low")):
        yield Change(
            rotate(rope, phases_of(rope) + step * omega),
            f"The port seems to rotate each token by a position {first}.",
        )


def _counted_with_padding(rope: Rope, failing: FailingSite) -> Iterator[Rope]:
    if failing.recorded.keep is not None:
        yield replace(rope, positions=np.arange(failing.recorded.count))


def _by_head(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    omega = inv_freq(rope.config)
    yield rotate(rope, (np.arange(rope.x.shape[2])[:, None] * omega)[None, None])


def _scaling_ignored(rope: Rope, failing: FailingSite) -> Iterator[Rope]:
    if rope.config.rope_scaling is not None:
        yield replace(rope, config=replace(rope.config, rope_scaling=None))


def _scaling_of_another_kind(rope: Rope, failing: FailingSite) -> Iterator[Change]:
    scaling = rope.config.rope_scaling
    if scaling is None or scaling.factor == 1:
        return
    stretched = int(rope.positions.max()) >= rope.config.max_position_embeddings
    for kind in ("linear", "dynamic", "yarn") if stretched else ("linear", "yarn"):
        if kind != scaling.rope_type:
            other = RopeScaling(kind, factor=scaling.factor)
            yield Change(
                replace(rope, config=replace(rope.config, rope_scaling=other)),
                f"The port seems to scale frequencies as rope_type {kind!r} does, with the same "
                f"factor; this model has {scaling.rope_type!r}.",
            )


def _another_parameter(rope: Rope, failing: FailingSite) -> Iterator[Change]:
    scaling, length = rope.config.rope_scaling, rope.config.max_position_embeddings
    if scaling is None:
        return
    changes: list[dict[str, Any]] = []
    if scaling.rope_type in ("yarn", "llama3"):
        changes.append({"original_max_position_embeddings": length})
        changes.append({"original_max_position_embeddings": int(length * scaling.factor)})
    if scaling.rope_type == "yarn":
        changes.append({"truncate": scaling.truncate is False})
        changes.append(
            {"beta_fast": scaling.beta_slow or 1.0, "beta_slow": scaling.beta_fast or 32.0}
        )
        changes += [{"mscale": None, "mscale_all_dim": None}, {"attention_factor": None}]
    for change in changes:
        if any(getattr(scaling, name) != value for name, value in change.items()):
            said = " and ".join(f"{name} {value}" for name, value in change.items())
            yield Change(
                replace(rope, config=replace(rope.config, rope_scaling=replace(scaling, **change))),
                f"The port seems to compute with {said} in rope_scaling; this model has "
                f"{' and '.join(str(getattr(scaling, name)) for name in change)}.",
            )


def _factor_inverted(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    scaling = rope.config.rope_scaling
    if scaling is not None:
        plain = phases_of(rope, replace(rope.config, rope_scaling=None))
        yield rotate(rope, plain * scaling.factor)


def _attention_factor_missing(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    yield rotate(rope, phases_of(rope), 1.0)


def _attention_factor_misused(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    factor = attention_factor(rope.config)
    right = rotate(rope, phases_of(rope))
    yield replace(right, sin=right.sin / factor)
    yield replace(right, cos=right.cos / factor)
    yield rotate(rope, phases_of(rope), factor**2)
    yield rotate(rope, phases_of(rope), math.sqrt(factor))
    yield rotate(rope, phases_of(rope), 1 / factor)


def _not_applied(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    phases = phases_of(rope)
    yield rotate(rope, np.zeros_like(phases))
    yield rotate(rope, np.zeros_like(phases), 1.0)


def _applied_twice(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    yield rotate(rope, 2 * phases_of(rope), attention_factor(rope.config) ** 2)


def _swapped(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
    right = rotate(rope, phases_of(rope))
    yield replace(right, cos=right.sin, sin=right.cos)


def _one_half(rope: Rope, failing: FailingSite) -> Iterator[Computable]:
    """One result of each pair is left as it was, or half of all pairs is."""
    bound = rotate(rope, phases_of(rope)).bound(failing.formats)
    x, dim = wide(rope.x), rope.x.shape[-1]
    channel = np.arange(dim)
    magnitude = np.abs(x) + np.abs(np.roll(x, dim // 2, axis=-1))
    for kept in (
        channel >= dim // 2,
        channel < dim // 2,
        channel % (dim // 2) >= dim // 4,
        channel % (dim // 2) < dim // 4,
    ):
        yield Formula(np.where(kept, x, bound.exact), magnitude, 6)


def _first_channels_only(rope: Rope, failing: FailingSite) -> Iterator[Computable]:
    """The first D / 2 channels turned among themselves, as partial rotary embeddings do."""
    dim = rope.x.shape[-1]
    if dim % 4:
        return
    x = wide(rope.x)
    first = rotate(
        replace(rope, x=x[..., : dim // 2]),
        phases_of(rope, replace(rope.config, head_dim=dim // 2)),
    ).bound(failing.formats)
    exact = np.concatenate([first.exact, x[..., dim // 2 :]], axis=-1)
    yield Formula(exact, np.abs(x) + np.abs(np.roll(x, dim // 4, axis=-1)) + np.abs(exact), 6)


HYPOTHESES = (
    Hypothesis(
        "RoPE layout interleaved",
        Rope,
        _layout,
        "The port seems to pair channels 2i and 2i + 1; this checkpoint pairs i and i + D / 2.",
    ),
    Hypothesis(
        "RoPE pairs put back in the other layout",
        Rope,
        _put_back_otherwise,
        "The port seems to take pairs of channels in one layout and to put them back in the "
        "other; both should be i and i + D / 2.",
    ),
    Hypothesis(
        "RoPE turned the other way",
        Rope,
        _turned_back,
        "The port seems to rotate by minus the phase: the sign of the sine is wrong.",
    ),
    Hypothesis("another rope_theta", Rope, _other_theta),
    Hypothesis(
        "RoPE exponent",
        Rope,
        _exponent,
        "The port seems to take theta to the power of -4i / D or -i / D; it should be -2i / D.",
    ),
    Hypothesis("RoPE position off by one", Rope, _off_by_one),
    Hypothesis(
        "padding counted in positions",
        Rope,
        _counted_with_padding,
        "The port seems to count positions from the start of the batch; they should be counted "
        "from the first token that is not padding.",
    ),
    Hypothesis(
        "RoPE by head",
        Rope,
        _by_head,
        "The port seems to rotate by the number of the head; it should be the token's position.",
    ),
    Hypothesis(
        "RoPE scaling ignored",
        Rope,
        _scaling_ignored,
        "The port seems to compute plain frequencies; this model has a rope_scaling.",
    ),
    Hypothesis("RoPE scaling of another kind", Rope, _scaling_of_another_kind),
    Hypothesis("another parameter of RoPE scaling", Rope, _another_parameter),
    Hypothesis(
        "RoPE scaling factor inverted",
        Rope,
        _factor_inverted,
        "The port seems to multiply frequencies with the scaling factor; it should divide.",
    ),
    Hypothesis(
        "attention factor of yarn missing",
        Rope,
        _attention_factor_missing,
        "The port seems to rotate without yarn's attention factor; cosines and sines should be "
        "multiplied with it.",
    ),
    Hypothesis(
        "attention factor of yarn misused",
        Rope,
        _attention_factor_misused,
        "The port seems to apply yarn's attention factor to cosines or sines only, or to another "
        "power; both should be multiplied with it, once.",
    ),
    Hypothesis(
        "RoPE not applied",
        Rope,
        _not_applied,
        "The port seems to leave queries or keys as they are; it should rotate them.",
    ),
    Hypothesis(
        "RoPE applied twice",
        Rope,
        _applied_twice,
        "The port seems to rotate by twice the phase; it should rotate once.",
    ),
    Hypothesis(
        "RoPE cosine and sine swapped",
        Rope,
        _swapped,
        "The port seems to take cosines for sines and sines for cosines.",
    ),
    Hypothesis(
        "RoPE on half of the channels",
        Rope,
        _one_half,
        "The port seems to rotate half of the channels only; it should rotate all.",
    ),
    Hypothesis(
        "partial RoPE",
        Rope,
        _first_channels_only,
        "The port seems to rotate the first half of a head by itself; pairs should be i and "
        "i + D / 2 of the whole head.",
    ),
)
