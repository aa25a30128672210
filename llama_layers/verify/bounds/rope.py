"""Rounding of rotary position embedding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.config.rope_scaling import RopeScaling
from llama_layers.layers.rope import attention_factor, inv_freq
from llama_layers.verify.bounds.bound import (
    Bound,
    Float64Array,
    beyond,
    bounded,
    compounded,
    finite_magnitude,
    float64,
    formats,
    input_error,
    known_format,
    lost_to_underflow,
    narrowing,
    own_error,
    rounded,
)
from llama_layers.verify.profiles import Rounding

# The error that is allowed a power, in unit roundoffs: 4 units in the last place, as of CUDA's.
POWER = 8
# The same for theta, the inverse, the position and its product with the frequency together.
PRODUCTS = 4
# And for each pair after the first, if its frequency is the one before times a host's power.
STEP = 3


def rope_bound(
    x: Any,
    positions: Any,
    config: LlamaConfig,
    /,
    *,
    layout: Literal["half", "interleaved"] = "half",
    dtype: str | None = None,
    accumulate: str | None = None,
    phases: str | None = None,
    table: str | None = None,
    arithmetic: str | None = None,
    trig_ulps: float = 1.0,
    flushes: bool = False,
    inputs: str | None = None,
) -> Bound:
    r"""The exact rotation of `llama_layers.apply_rope` and the bound on its error.

    Of a pair :math:`(a, b)` turned by :math:`\phi`, the element :math:`y = a \cos\phi - b \sin\phi`
    (and as well the other) is made of a table that errs by

    .. math:: \tau |\cos\phi| + \delta, \quad \tau = (1 + 2 u t)(1 + u_t) - 1

    with t the `trig_ulps` and :math:`u_t` the roundoff of the table's format, if it has one of its
    own, and :math:`\delta` the error of the phase (cosine and sine change no faster than it); then
    of two products and a sum:

    .. math:: |\hat y - y| \le (1 + \beta)(|a| + |b|) \delta
        + ((1 + \beta)(1 + \tau) - 1)(|a \cos\phi| + |b \sin\phi|) + \eta,
        \quad \beta = (1 + u)^2 (1 + u_a)^2 - 1

    with :math:`u_a` the roundoff of the format that products and sum are rounded to, if there is
    one. For "yarn" the table is multiplied by a rounded factor: another :math:`(1 + u)^2`.

    **Phases.** In a format with roundoff :math:`u_f`, the frequency
    :math:`\omega_i = \theta^{-2i/D}` errs by a relative :math:`u_f` times

    - :math:`3 |\ln \omega_i|` for three roundings in the exponent: 2i/D, and if the power is made
      of an exponential, the logarithm of theta and the product,
    - 8 for the power, within 4 units in the last place as CUDA's is,
    - 4 for theta, the inverse, the position and its product with the frequency,
    - 3 i where each frequency is the one before it times :math:`\theta^{-2/D}`, as in llama.cpp:
      a rounding, and a power within 1 unit in the last place,

    and what scaling adds: 1 for "linear" (a division); for "dynamic" the error of the stretched
    theta, raised to :math:`D / (D - 2)`; for "llama3" and "yarn" that of the blend between kept
    and divided frequencies, whose weight changes the frequency by a relative
    :math:`(\omega / \omega')(1 - 1 / s)` for the factor s. Phases in float64 err by the same with
    its roundoff.

    At position 0 nothing is turned, and nothing allowed but the rounding into the result's format.

    Where the engine turned other numbers than were stored, within :math:`\delta_a` and
    :math:`\delta_b` (`inputs`), the element is off by
    :math:`\delta_a |\cos\phi| + \delta_b |\sin\phi|`, at every position, and
    :math:`|a| + \delta_a` and :math:`|b| + \delta_b` are what the errors above are relative to.

    Parameters
    ----------
    x : Array, shape [B, S, heads, D]
        Queries or keys, as they were stored.
    positions : Array, shape [S] or [B, S], an integer dtype
        Token positions; of the whole call, since "dynamic" scaling depends on the largest.
    config : LlamaConfig
        Its ``rope_theta``, ``head_dim`` and ``rope_scaling`` are read.
    layout : {"half", "interleaved"}
        Which channels are a pair; see `llama_layers.apply_rope`.
    dtype : str, optional
        The format of the result; that of `x` if not given.
    accumulate : str, optional
        The format of the arithmetic; float32, or float64 for float64 `x`, if not given.
    phases : str, optional
        The format that phases are computed in; float64 if not given.
    table : str, optional
        A format that cosines and sines are rounded to.
    arithmetic : str, optional
        A format that the products and the sum are each rounded to.
    trig_ulps : float, optional
        What is assumed of the engine: the error of its cosines and sines, in units in the last
        place.
    flushes : bool, optional
        Whether the engine takes subnormal numbers for zero.
    inputs : str, optional
        The format that `x` was rounded to where it was stored, though the engine computed from
        what it was before, in the format of the sums. Nothing is if it has all digits of that.

    Returns
    -------
    Bound
        Of the shape of `x`. ``usual`` is the limit: so few roundings need not cancel.

    Raises
    ------
    TypeError
        If `x` holds no floats or `positions` no integers.
    ValueError
        If a shape does not fit, or a layout or a format is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import LlamaConfig, apply_rope, rope_table
    >>> from llama_layers.verify import rope_bound
    >>> config, places = LlamaConfig.llama2_7b(), np.arange(3)
    >>> x = np.linspace(-1, 1, 384, dtype=np.float32).reshape(1, 3, 1, 128)
    >>> y = apply_rope(x, *rope_table(places, config, like=x))
    >>> bool(np.all(rope_bound(x, places, config).ratio(y) <= 1))
    True
    """
    out, sums = formats("x", x, dtype, accumulate)
    table_format = narrowing(known_format("table", table), sums)
    between = narrowing(known_format("arithmetic", arithmetic), sums)
    x64, places = float64(x), to_numpy(positions)
    check_rope(x64, places, config, layout)
    u, lost = sums.unit_roundoff, lost_to_underflow(sums, flushes)
    form = known_format("phases", phases) or FLOATS["float64"]
    angles, delta = _phases(places, config, form.unit_roundoff)
    factor = attention_factor(config)
    extra = 0.0 if table_format is None else table_format.unit_roundoff
    tau = compounded(2 * u * trig_ulps, extra, *([u, u] if factor != 1 else []))
    still = (angles == 0) & (factor == 1)
    with np.errstate(all="ignore"):
        cos, sin = (turn(angles) * factor for turn in (np.cos, np.sin))
        delta = np.minimum(delta, 2.0) * abs(factor) * (1 + tau)
        if table_format is not None:
            delta = delta + table_format.smallest_subnormal
        steps = [u, u] if between is None else [u, u, between.unit_roundoff, between.unit_roundoff]
        beta = compounded(*steps)
        first, second = _pairs(x64, layout)
        off = input_error(x64, narrowing(known_format("inputs", inputs), sums))
        off_first, off_second = _pairs(off, layout)
        y, limit = np.empty_like(x64), np.empty_like(x64)
        channels = _pairs(np.arange(x64.shape[-1]), layout)
        for into, a, b, off_a, off_b, s in (
            (channels[0], first, second, off_first, off_second, -sin),
            (channels[1], second, first, off_second, off_first, sin),
        ):
            y[..., into] = exact = a * cos + b * s
            size_a, size_b = finite_magnitude(a) + off_a, finite_magnitude(b) + off_b
            magnitude = size_a * np.abs(cos) + size_b * np.abs(s)
            error = compounded(beta, tau) * magnitude + (1 + beta) * (size_a + size_b) * delta
            error = own_error(sums) * error + lost * (size_a + size_b + 3 + 2 * abs(factor))
            error = error + off_a * np.abs(cos) + off_b * np.abs(s)
            overflows = ~(magnitude + error < sums.max)
            if between is not None:
                error = error + 3 * between.smallest_subnormal
                overflows |= ~(magnitude + error < between.max)
            error[(still | ((a == 0) & (b == 0))) & (off_a + off_b == 0)] = 0.0
            if between is None or out is not between:
                error = rounded(error, exact, narrowing(out, sums))
            # An angle that is off by a little may turn plus infinity into minus infinity.
            flips = np.minimum(np.abs(cos), np.abs(s)) <= delta + tau
            overflows |= beyond(exact, error, out) | (~np.isfinite(exact) & flips)
            limit[..., into] = np.where(overflows, np.inf, error)
    return bounded(y, (limit, limit))


def check_rope(x: Float64Array, positions: Any, config: LlamaConfig, layout: str) -> None:
    if x.ndim != 4 or x.shape[3] != config.head_dim:
        raise ValueError(f"x: expected shape [B, S, heads, {config.head_dim}], got {list(x.shape)}")
    if not np.issubdtype(positions.dtype, np.integer):
        raise TypeError(f"positions: expected an integer dtype, got {positions.dtype}")
    batch, length = x.shape[:2]
    if positions.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(
            f"positions: expected shape [{length}] or [{batch}, {length}], "
            f"got {list(positions.shape)}"
        )
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout: expected 'half' or 'interleaved', got {layout!r}")


def _pairs(x: Any, layout: str) -> tuple[Any, Any]:
    """The first and the second channel of each pair."""
    if layout == "half":
        return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x[..., 0::2], x[..., 1::2]


def _phases(
    positions: Any, config: LlamaConfig, roundoff: float
) -> tuple[Float64Array, Float64Array]:
    """The angles [..., S, 1, D / 2], and how far they are off if computed with a roundoff."""
    length = int(positions.max()) + 1 if positions.size else None
    frequencies = inv_freq(config, length=length)
    angles = positions[..., None, None].astype(np.float64) * frequencies
    own = FLOATS["float64"].unit_roundoff
    errors = _relative_errors(config, frequencies, length, roundoff)
    errors = errors + _relative_errors(config, frequencies, length, own)
    return angles, np.abs(angles) * errors


def phase_errors(
    positions: Any, config: LlamaConfig, how: Rounding
) -> tuple[Float64Array, Float64Array]:
    """The phases [..., S, 1, D / 2], and how far they are off."""
    form = FLOATS[how.profile.phases or "float64"]
    return _phases(to_numpy(positions), config, form.unit_roundoff)


def _relative_errors(
    config: LlamaConfig, frequencies: Float64Array, length: int | None, u: float
) -> Float64Array:
    """Of the phases of each pair, for the derivation in `rope_bound`."""
    plain: Float64Array = inv_freq(dataclasses.replace(config, rope_scaling=None))
    scaling = config.rope_scaling
    dynamic = scaling is not None and scaling.rope_type == "dynamic"
    exponents: Float64Array = np.abs(np.log(frequencies if dynamic else plain))
    roundings = 3 * exponents + POWER + PRODUCTS + STEP * np.arange(len(plain))
    if scaling is None:
        return roundings * u
    if scaling.rope_type == "linear":
        return (roundings + 1) * u
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
    if config.head_dim == 2 or config.rope_scaling is None:
        return 0.0
    exponent = config.head_dim / (config.head_dim - 2)
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
    pairs = config.head_dim / (2 * math.log(config.rope_theta))
    ends = (
        pairs * math.log(trained / (2 * math.pi * turns))
        for turns in (scaling.beta_fast or 32.0, scaling.beta_slow or 1.0)
    )
    low, high = (min(max(end, 0.0), config.head_dim - 1.0) for end in ends)
    # Both ends are made of logarithms; what is lost in them counts over the ramp's width.
    return 8 * (low + high + pairs) / (abs(high - low) or 0.001) + 8
