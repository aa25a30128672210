"""The phases that RoPE rotates by, and how far off they are in an engine's arithmetic."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.layers.rope import inv_freq
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

# The error that is allowed a power, in unit roundoffs: 4 units in the last place, as of CUDA's.
POWER = 8
# The same for theta, the inverse, the position and its product with the frequency together.
PRODUCTS = 4
# And for each pair after the first, if its frequency is the one before times a host's power.
STEP = 3


@dataclass(frozen=True, eq=False)
class Rotation:
    """Queries or keys, and by how much RoPE rotates them."""

    x: Tracked  # queries or keys, [B, S, heads, D]
    phases: Float64Array  # by how much each pair is rotated, [..., S, 1, R / 2]
    off: Float64Array  # how far off the phases can be
    factor: float  # of cosines and sines
    layout: str  # which channels are a pair: "half" or "interleaved"
    temperature: np.ndarray | None = None  # by token, of queries

    @property
    def width(self) -> int:
        """How many channels of a head are rotated: R, the first ones."""
        return int(2 * self.phases.shape[-1])

    @property
    def pairs(self) -> tuple[Tracked, Tracked]:
        """The first and the second channel of each pair."""
        x, half = self.x[..., : self.width], self.width // 2
        if self.layout == "half":
            return x[..., :half], x[..., half:]
        return x[..., 0::2], x[..., 1::2]

    @property
    def table(self) -> tuple[Tracked, Tracked]:
        """The cosines and sines, which change no faster than the phase.

        Each errs by `trig_ulps` units in the last place besides. Nothing is off at phase 0.
        """
        how = self.x.how
        still = self.phases == 0
        off = np.where(still, 0.0, np.minimum(self.off, 2.0))
        table = []
        for function in (np.cos, np.sin):
            exact = function(self.phases)
            ulps = 2 * how.profile.trig_ulps * how.unit * (np.abs(exact) + off)
            error = np.where(still, 0.0, off + ulps)
            values = Tracked(exact, error, error, how, how.sums) * self.factor
            table.append(values.step("rope_table"))
        return table[0], table[1]

    def plus(self, a: Tracked, b: Tracked) -> Tracked:
        """The sum of two products, with the roundings of a profile's arithmetic."""
        return (a.step("rope_arithmetic") + b.step("rope_arithmetic")).step("rope_arithmetic")

    def joined(self, first: Tracked, second: Tracked) -> Tracked:
        """The first and the second channels of the pairs, put where they belong."""
        if self.layout == "half":
            order = np.arange(self.width)
        else:
            order = np.arange(self.width).reshape(2, -1).T.ravel()
        joined = _side_by_side(first, second)[..., order]
        if self.width < self.x.shape[-1]:
            joined = _side_by_side(joined, self.x[..., self.width :])
        return joined if self.temperature is None else joined * self.factors

    @property
    def factors(self) -> Tracked:
        """The temperature of each query: one and a multiple of a logarithm."""
        assert self.temperature is not None  # or there are none
        how, exact = self.x.how, self.temperature[..., None, None].astype(np.float64)
        roundings = 2 * how.profile.exp_ulps + 4  # a quotient, a sum, the logarithm, and a product
        error = how.unit * (roundings * np.abs(exact - 1) + np.abs(exact))
        return Tracked(exact, error, error, how, how.sums).step("rope_table")


def _side_by_side(first: Tracked, second: Tracked) -> Tracked:
    """The channels of both."""
    errors = first.errors(
        lambda e, f: np.concatenate(
            [np.broadcast_to(e, first.shape), np.broadcast_to(f, second.shape)], -1
        ),
        second,
    )
    return first.with_errors(errors, np.concatenate([first.exact, second.exact], -1))


def rope_phases(
    positions: NDArray[np.integer], config: LlamaConfig, roundoff: float
) -> tuple[Float64Array, Float64Array]:
    r"""The phases [..., S, 1, R / 2], and how far off they are if computed with a roundoff.

    In a format with roundoff u, the frequency :math:`\omega_i = \theta^{-2i/R}` errs by a relative
    u times

    - :math:`3 |\ln \omega_i|` for three roundings in the exponent: 2i/R, and if the power is made
      of an exponential, the logarithm of theta and the product,
    - 8 for the power, within 4 units in the last place as CUDA's is,
    - 4 for theta, the inverse, the position and its product with the frequency,
    - 3 i where each frequency is the one before it times :math:`\theta^{-2/R}`, as in llama.cpp:
      a rounding, and a power within 1 unit in the last place,

    and what scaling adds: 1 for "linear" (a division); for "dynamic" the error of the stretched
    theta, raised to :math:`R / (R - 2)`; 2 for "longrope" (a divisor that is rounded, and its
    product or quotient); for "llama3" and "yarn" that of the blend between kept
    and divided frequencies, whose weight changes the frequency by a relative
    :math:`(\omega / \omega')(1 - 1 / s)` for the factor s.
    """
    length = int(positions.max()) + 1 if positions.size else None
    frequencies = inv_freq(config, length=length)
    angles = positions[..., None, None].astype(np.float64) * frequencies
    own = FLOATS["float64"].unit_roundoff
    errors = _relative_errors(config, frequencies, length, roundoff)
    errors = errors + _relative_errors(config, frequencies, length, own)
    return angles, np.abs(angles) * errors


def _relative_errors(
    config: LlamaConfig, frequencies: Float64Array, length: int | None, u: float
) -> Float64Array:
    """The relative errors of the phases of each pair; see `rope_phases`."""
    plain: Float64Array = inv_freq(dataclasses.replace(config, rope_scaling=None))
    scaling = config.rope_scaling
    dynamic = scaling is not None and scaling.rope_type == "dynamic"
    exponents: Float64Array = np.abs(np.log(frequencies if dynamic else plain))
    roundings = 3 * exponents + POWER + PRODUCTS + STEP * np.arange(len(plain))
    if scaling is None:
        return roundings * u
    if scaling.rope_type == "linear":
        return (roundings + 1) * u
    if scaling.rope_type == "longrope":
        return (roundings + 2) * u
    if scaling.rope_type == "dynamic":
        return (roundings + _stretch(config, length)) * u
    if scaling.rope_type == "llama3":
        weight = _band(scaling, plain, roundings, u)
    else:
        weight = np.full_like(roundings, _ramp(config, scaling))
    # Beside the weight itself: a division, two products, a difference and a sum.
    return (roundings + 5 + plain / frequencies * (1 - 1 / scaling.factor) * weight) * u


def _stretch(config: LlamaConfig, length: int | None) -> float:
    """Roundings in the stretched theta of "dynamic": its own power and product, and its base's."""
    if config.rotary_dim == 2 or config.rope_scaling is None:
        return 0.0
    exponent = config.rotary_dim / (config.rotary_dim - 2)
    factor, trained = config.rope_scaling.factor, config.max_position_embeddings
    stretch = factor * max(length or 0, trained) / trained - (factor - 1)
    return exponent * (2 * factor + 3 + 3 * math.log(stretch)) + POWER + 1


def _band(
    scaling: RopeScaling, plain: Float64Array, roundings: Float64Array, u: float
) -> Float64Array:
    """Roundings in the weight of the blend of "llama3", which is exact outside its band."""
    assert scaling.original_max_position_embeddings is not None
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    tolerance = 2 * (roundings + 4) * u
    inside = (turns > low * (1 - tolerance)) & (turns < high * (1 + tolerance))
    # Of the turns, over a width; a difference, and a quotient of the weight, which is at most 1.
    return np.where(inside, turns * (roundings + 4) / (high - low) + 3, 0.0)


def _ramp(config: LlamaConfig, scaling: RopeScaling) -> float:
    """Roundings in the weight of the blend of "yarn"; ends that are whole numbers have none."""
    if scaling.truncate is not False:
        return 3.0
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    pairs = config.rotary_dim / (2 * math.log(config.rope_theta))
    ends = (
        pairs * math.log(trained / (2 * math.pi * turns))
        for turns in (scaling.beta_fast or 32.0, scaling.beta_slow or 1.0)
    )
    low, high = (min(max(end, 0.0), config.rotary_dim - 1.0) for end in ends)
    # Both ends are made of logarithms; what is lost in them counts over the ramp's width.
    return 8 * (low + high + pairs) / (abs(high - low) or 0.001) + 8
