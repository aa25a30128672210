"""The operations of a layer, each with its formula over tracked numbers.

An operation is a dataclass of what it is computed from. ``operation.read(how)`` is a view of it:
the same fields as tracked numbers, in the formats and with the roundings of a `Rounding`.
``operation.formula`` is a function of that view. ``operation.bound(how)`` evaluates it, rounds it
into the result's format, and gives the exact result and what rounding allows.

A mistake is a copy with another field, ``replace(operation, eps=0.0)``, or another formula on the
same view, which has a bound without an analysis of its own:

>>> import numpy as np
>>> from llama_layers.verify.operations import Mistaken, Norm
>>> from llama_layers.verify.profiles import Rounding
>>> norm = Norm(np.float32([[3, 4]]), np.float32([1, 1]), eps=1.0)
>>> outside = Mistaken(norm, lambda n: n.x / ((n.x * n.x).mean().sqrt() + n.eps) * n.weight)
>>> outside.bound(Rounding("float32", "float32")).exact.round(3)
array([[0.661, 0.882]])

A formula names the steps that a rounding profile may round, ``row.step("norm_before_weight")``:
nothing happens where it does not.

The views:

- `Norm`: ``x``, ``weight`` (tracked), ``eps``.
- `Linear`: ``x`` (tracked), ``weight``, ``bias`` (arrays, for ``x.matmul(weight, bias)``).
- `Residual`: ``x``, ``added`` (tracked).
- `Rope`: a `Rotation`: ``x`` and ``table`` (tracked), ``phases``, ``factor``, ``layout``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.rope import attention_factor
from llama_layers.verify.bounds import (
    Bound,
    attention_bound,
    embedding_bound,
    probabilities_bound,
    scores_bound,
    softmax_bound,
    swiglu_bound,
    weighted_sum_bound,
)
from llama_layers.verify.bounds.bound import Float64Array
from llama_layers.verify.bounds.rope import check_rope, phase_errors
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.tracked import Tracked, read

Formats = Rounding


class Operation:
    """What operations have in common: a formula over what they read, and a bound by it."""

    def read(self, how: Rounding) -> Any:
        """The fields as tracked numbers: what `formula` is evaluated on."""
        raise NotImplementedError

    def evaluate(self, formula: Callable[[Any], Tracked], how: Rounding) -> Bound:
        """The exact result of a formula, right or wrong, and what rounding allows."""
        return formula(self.read(how)).bound()

    def bound(self, formats: Rounding) -> Bound:
        """The exact result of the operation, and what rounding allows."""
        return self.evaluate(type(self).formula, formats)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Mistaken:
    """An operation with a wrong formula, which has a bound as the right one has."""

    operation: Operation
    formula: Callable[[Any], Tracked]

    def bound(self, formats: Rounding) -> Bound:
        """The exact result of the wrong formula, and what rounding allows."""
        return self.operation.evaluate(self.formula, formats)


@dataclass(frozen=True, eq=False)
class Embedding(Operation):
    """Rows of a table."""

    ids: Any
    table: Any

    def bound(self, formats: Formats) -> Bound:
        """The exact rows, and what rounding into the result's format allows."""
        return embedding_bound(self.ids, self.table, dtype=formats.dtype)


@dataclass(frozen=True, eq=False)
class Norm(Operation):
    """RMSNorm."""

    x: Any
    weight: Any
    eps: float

    def read(self, how: Rounding) -> Norm:
        """x and weight as tracked numbers."""
        weight = read(self.weight, how, recorded=False, name="weight")
        return replace(self, x=read(self.x, how), weight=weight)

    def formula(self) -> Tracked:
        """x over the root of its mean square and eps, times the weight."""
        row: Tracked = self.x * ((self.x * self.x).mean() + self.eps).rsqrt()
        return row.step("norm_before_weight") * self.weight


@dataclass(frozen=True, eq=False)
class Linear(Operation):
    """A product with a matrix [out, in], and a bias."""

    x: Any
    weight: Any
    bias: Any | None = None

    def read(self, how: Rounding) -> Linear:
        """x as tracked numbers, the matrix and the bias as they are."""
        return replace(self, x=read(self.x, how))

    def formula(self) -> Tracked:
        """The products of x with each row of the matrix."""
        product: Tracked = self.x.matmul(self.weight, self.bias)
        return product


@dataclass(frozen=True, eq=False)
class Rope(Operation):
    """Rotary position embedding of x [B, S, heads, D] at positions [S] or [B, S]."""

    x: Any
    positions: Any
    config: LlamaConfig
    layout: Literal["half", "interleaved"] = "half"

    def read(self, how: Rounding) -> Rotation:
        """x and the table of cosines and sines as tracked numbers."""
        x = read(self.x, how)
        check_rope(x.exact, self.positions, self.config, self.layout)
        phases, off = phase_errors(self.positions, self.config, how)
        return Rotation(x, phases, off, attention_factor(self.config), self.layout)

    @staticmethod
    def formula(rotation: Rotation) -> Tracked:
        """Each pair of channels, rotated by its phase."""
        return rotation.joined(*rotation.rotated(*rotation.pairs, *rotation.table))


@dataclass(frozen=True, eq=False)
class Rotation:
    """What RoPE rotates, and by how much.

    Attributes
    ----------
    x : Tracked
        Queries or keys, [B, S, heads, D].
    phases : ndarray of float64
        By how much each pair is rotated, [..., S, 1, D / 2].
    off : ndarray of float64
        How far off the phases can be.
    factor : float
        What cosines and sines are multiplied by.
    layout : {"half", "interleaved"}
        Which channels are a pair.
    """

    x: Tracked
    phases: Float64Array
    off: Float64Array
    factor: float
    layout: str

    @property
    def pairs(self) -> tuple[Tracked, Tracked]:
        """The first and the second channel of each pair."""
        if self.layout == "half":
            half = self.x.shape[-1] // 2
            return self.x[..., :half], self.x[..., half:]
        return self.x[..., 0::2], self.x[..., 1::2]

    @property
    def table(self) -> tuple[Tracked, Tracked]:
        r"""The cosines and sines.

        Each errs by :math:`\tau |\cos\phi| + \delta`, :math:`\tau = (1 + 2 u t)(1 + u_t) - 1`,
        with t the `trig_ulps`, :math:`u_t` the roundoff of the table's format, and :math:`\delta`
        the error of the phase: cosine and sine change no faster than it. A factor is rounded, and
        so is its product. Nothing is off at phase 0.
        """
        how = self.x.how
        delta = np.where(self.phases == 0, 0.0, np.minimum(self.off, 2.0))
        turns = []
        for function in (np.cos, np.sin):
            exact = function(self.phases)
            trig = 2 * how.profile.trig_ulps * how.unit * (np.abs(exact) + delta)
            off = np.where(self.phases == 0, 0.0, delta + trig)
            values = Tracked(exact, off, off, how, how.sums)
            turns.append((values * self.factor).step("rope_table"))
        return turns[0], turns[1]

    def rotated(
        self, a: Tracked, b: Tracked, cos: Tracked, sin: Tracked
    ) -> tuple[Tracked, Tracked]:
        """The pair (a, b), rotated."""
        a_cos, b_sin, b_cos, a_sin = (
            product.step("rope_arithmetic") for product in (a * cos, b * sin, b * cos, a * sin)
        )
        return (a_cos - b_sin).step("rope_arithmetic"), (b_cos + a_sin).step("rope_arithmetic")

    def joined(self, first: Tracked, second: Tracked) -> Tracked:
        """The channels of pairs where they belong."""

        def join(a: Float64Array, b: Float64Array) -> Float64Array:
            if self.layout == "half":
                return np.concatenate([a, b], axis=-1)
            return np.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)

        off = join(first.off, second.off)
        return replace(first, exact=join(first.exact, second.exact), off=off, usual=off)


@dataclass(frozen=True, eq=False)
class Scores(Operation):
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
class Softmax(Operation):
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
class Probabilities(Operation):
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
class WeightedSum(Operation):
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
class Attention(Operation):
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
class Gate(Operation):
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
class Residual(Operation):
    """The residual stream and what a block adds to it."""

    x: Any
    added: Any

    def read(self, how: Rounding) -> Residual:
        """Both as tracked numbers."""
        return replace(self, x=read(self.x, how), added=read(self.added, how))

    def formula(self) -> Tracked:
        """Their sum."""
        total: Tracked = self.x + self.added
        return total
