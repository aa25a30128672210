"""Roundings that engines make on purpose, beyond the one into the result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Persona:
    """What an engine rounds beyond the contract of this package.

    The contract: the phases of RoPE in float64, every other step in the format of the sums, one
    rounding into the format of the result. "The dtype" below is that of the result.

    Attributes
    ----------
    name : str
        The engine.
    norm_before_weight : bool
        RMSNorm rounds the normalised row to the dtype before it multiplies with the weight.
    phases : str or None
        The format in which RoPE multiplies positions and frequencies; None for float64.
    rope_table : bool
        Cosines and sines are rounded to the dtype.
    rope_arithmetic : bool
        The products and the sum of RoPE are each rounded to the dtype.
    scores : bool
        The scores of attention are rounded to the dtype, before and after they are scaled.
    probabilities : bool
        The probabilities of attention are rounded to the dtype.
    silu : bool
        silu(gate) is rounded to the dtype before it multiplies.
    kv_cache : str or None
        The format that attention reads queries, keys and values in; None for the dtype.
    flushes : bool
        Subnormal numbers are taken for zero.
    """

    name: str
    norm_before_weight: bool = False
    phases: str | None = None
    rope_table: bool = False
    rope_arithmetic: bool = False
    scores: bool = False
    probabilities: bool = False
    silu: bool = False
    kv_cache: str | None = None
    flushes: bool = False


CONTRACT = Persona("contract")
