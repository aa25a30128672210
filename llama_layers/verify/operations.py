"""Operations with all that they are computed from, ready to be recomputed in float64.

One dataclass an operation: its fields are what the operation reads, so that a hypothesis about a
mistake is a copy with another field, and `bound` is its exact result and what rounding allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llama_layers.arrays.dtypes import FLOATS, FloatFormat
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.verify.bounds import (
    Bound,
    attention_bound,
    embedding_bound,
    linear_bound,
    probabilities_bound,
    residual_bound,
    rms_norm_bound,
    rope_bound,
    scores_bound,
    softmax_bound,
    swiglu_bound,
    weighted_sum_bound,
)
from llama_layers.verify.profiles import CONTRACT, PROFILES, RoundingProfile


@dataclass(frozen=True)
class Formats:
    """In what formats, and with which roundings, an engine computes.

    Attributes
    ----------
    dtype : str
        Of the result.
    accumulate : str
        Of sums and of everything between the inputs and the result.
    profile : RoundingProfile
        What is rounded beside that.
    inputs : str or None
        Of the narrowest input, where it was recorded; None if there is none.
    """

    dtype: str
    accumulate: str
    profile: RoundingProfile = CONTRACT
    inputs: str | None = None

    @property
    def profiles(self) -> tuple[RoundingProfile, ...]:
        """Those that an engine with these formats can have, in the order in which they are tried.

        A cache is narrower than the results that it keeps, and no one narrows float64 on purpose;
        nothing is kept in more digits than it was recorded in unless the sums have more. Narrow
        sums excuse too much to be tried.
        """
        return tuple(
            profile
            for profile in PROFILES.values()
            if profile.weighted_sums is None
            and (profile.kv_cache is None or self._cached_in(FLOATS[profile.kv_cache]))
            and (self._sums_have_more_digits or not profile.excess_precision)
        )

    def _cached_in(self, form: FloatFormat) -> bool:
        return self.dtype != "float64" and form.precision < FLOATS[self.dtype].precision

    @property
    def unrounded_inputs(self) -> str | None:
        """The format of the inputs, if the engine went on with what they were before it."""
        excess = self.profile.excess_precision and self._sums_have_more_digits
        return self.inputs if excess else None

    @property
    def _sums_have_more_digits(self) -> bool:
        """Than an input was recorded in."""
        narrowest = FLOATS[self.inputs or self.accumulate]
        return narrowest.precision < FLOATS[self.accumulate].precision

    @property
    def narrower(self) -> str | None:
        """The result's format, if it does not hold what sums are kept in."""
        return None if FLOATS[self.dtype].holds(FLOATS[self.accumulate]) else self.dtype

    def narrowed(self, rounds: bool) -> str | None:
        """The format of a step that the profile rounds to the result's dtype, if it does."""
        return self.dtype if rounds else None


@dataclass(frozen=True, eq=False)
class Embedding:
    """Rows of a table."""

    ids: Any
    table: Any

    def bound(self, formats: Formats) -> Bound:
        """The exact rows, and what rounding into the result's format allows."""
        return embedding_bound(self.ids, self.table, dtype=formats.dtype)


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm."""

    x: Any
    weight: Any
    eps: float

    def bound(self, formats: Formats) -> Bound:
        """The exact norm, and what rounding allows."""
        return rms_norm_bound(
            self.x,
            self.weight,
            eps=self.eps,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            normed=formats.narrowed(formats.profile.norm_before_weight),
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class Linear:
    """A product with a matrix [out, in], and a bias."""

    x: Any
    weight: Any
    bias: Any | None = None

    def bound(self, formats: Formats) -> Bound:
        """The exact product, and what rounding allows."""
        return linear_bound(
            self.x,
            self.weight,
            self.bias,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding of x [B, S, heads, D] at positions [S] or [B, S]."""

    x: Any
    positions: Any
    config: LlamaConfig
    layout: Literal["half", "interleaved"] = "half"

    def bound(self, formats: Formats) -> Bound:
        """The exact rotation, and what rounding allows."""
        profile = formats.profile
        return rope_bound(
            self.x,
            self.positions,
            self.config,
            layout=self.layout,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            phases=profile.phases,
            table=formats.narrowed(profile.rope_table),
            arithmetic=formats.narrowed(profile.rope_arithmetic),
            flushes=profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """Scaled products of queries and keys, of which those that a mask allows count."""

    q: Any
    k: Any
    mask: Any | None
    scale: float

    def bound(self, formats: Formats) -> Bound:
        """The exact scores, and what rounding allows."""
        bound = scores_bound(
            self.q,
            self.k,
            scale=self.scale,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            scores=formats.narrowed(formats.profile.scores),
            operands=formats.profile.kv_cache,
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )
        return bound if self.mask is None else bound.only(self.mask[..., None, :, :])


@dataclass(frozen=True, eq=False)
class Softmax:
    """Softmax over the keys that a mask allows."""

    scores: Any
    mask: Any | None

    def bound(self, formats: Formats) -> Bound:
        """The exact probabilities, and what rounding allows."""
        return softmax_bound(
            self.scores,
            mask=self.mask,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class Probabilities:
    """Softmax of scaled products of queries and keys."""

    q: Any
    k: Any
    mask: Any | None
    scale: float

    def bound(self, formats: Formats) -> Bound:
        """The exact probabilities, and what rounding allows."""
        return probabilities_bound(
            self.q,
            self.k,
            mask=self.mask,
            scale=self.scale,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            scores=formats.narrowed(formats.profile.scores),
            operands=formats.profile.kv_cache,
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """The values, weighed by probabilities [B, heads, S, T]."""

    probabilities: Any
    v: Any

    def bound(self, formats: Formats) -> Bound:
        """The exact sums, and what rounding allows."""
        return weighted_sum_bound(
            self.probabilities,
            self.v,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            operands=formats.profile.kv_cache,
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class Attention:
    """Scores, softmax and weighted sum at once, as fused kernels compute them."""

    q: Any
    k: Any
    v: Any
    mask: Any | None
    scale: float

    def bound(self, formats: Formats) -> Bound:
        """The exact attention, and what rounding allows."""
        profile = formats.profile
        return attention_bound(
            self.q,
            self.k,
            self.v,
            mask=self.mask,
            scale=self.scale,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            scores=formats.narrowed(profile.scores),
            probabilities=formats.narrowed(profile.probabilities),
            operands=profile.kv_cache,
            weighted_sums=profile.weighted_sums,
            flushes=profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class Gate:
    """The gated product, silu(gate) times up."""

    gate: Any
    up: Any

    def bound(self, formats: Formats) -> Bound:
        """The exact product, and what rounding allows."""
        return swiglu_bound(
            self.gate,
            self.up,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            sigmoid=formats.narrowed(formats.profile.sigmoid),
            silu=formats.narrowed(formats.profile.silu),
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )


@dataclass(frozen=True, eq=False)
class Residual:
    """The residual stream and what a block adds to it."""

    x: Any
    added: Any

    def bound(self, formats: Formats) -> Bound:
        """The exact sum, and what rounding allows."""
        return residual_bound(
            self.x,
            self.added,
            dtype=formats.dtype,
            accumulate=formats.accumulate,
            flushes=formats.profile.flushes,
            inputs=formats.unrounded_inputs,
        )


Operation = (
    Embedding
    | Norm
    | Linear
    | Rope
    | Scores
    | Softmax
    | Probabilities
    | WeightedSum
    | Attention
    | Gate
    | Residual
)
