"""RoPE in too few bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.verify.failing_site import Computable, FailingSite, wide
from llama_layers.verify.mistakes.registry import Changed, Kind, evaluated, mistake
from llama_layers.verify.mistakes.rope import by_phases, omega_of, rotated
from llama_layers.verify.mistakes.rounding import in_each_narrow_format, narrowed
from llama_layers.verify.operations import Rope
from llama_layers.verify.rotation import Rotation
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked


@in_each_narrow_format
def _phases_in(narrow: str) -> None:
    def to(array: np.ndarray) -> Float64Array:
        return wide(narrowed(np.asarray(array, np.float32), narrow))

    @mistake(
        Rope,
        f"RoPE phases in {narrow}",
        kind=Kind.ROUNDING,
        says=f"Computes positions, frequencies or phases in {narrow}; they need float32 or more.",
    )
    def _(rope: Rope, at: FailingSite) -> Iterator[Computable]:
        positions, omega = rope.positions[..., None, None], omega_of(rope)
        for phases in (
            to(to(positions) * to(omega)),
            positions * to(omega),
            to(positions) * omega,
            to(positions * omega),
            to(positions) * to(omega),
            to(positions * to(omega)),
        ):
            yield by_phases(rope, phases)


@in_each_narrow_format
def _table_in(narrow: str) -> None:
    def to(table: Tracked) -> Tracked:
        return replace(table, exact=wide(narrowed(table.exact.astype(np.float32), narrow)))

    @mistake(
        Rope,
        f"RoPE table in {narrow}",
        kind=Kind.ROUNDING,
        says=f"Rounds cosines and sines to {narrow}.",
    )
    def _(r: Rotation) -> Tracked:
        return rotated(r, *map(to, r.table))


# Bits after the point of a table in fixed point; one of more is within a narrow format's rounding.
_BITS = range(4, 13)


@mistake(Rope, "RoPE table in few bits", kind=Kind.ROUNDING)
def _(rope: Rope, at: FailingSite) -> Iterator[Changed]:
    """The port's cosines and sines seem to have {0} bits after the point; they need float32 at
    the least."""
    for bits in _BITS:
        for cut_off in (False, True):
            yield evaluated(rope, _in_fixed_point, 2.0**bits, cut_off), bits


def _in_fixed_point(r: Rotation, steps: float, cut_off: bool) -> Tracked:
    to = np.trunc if cut_off else np.round
    table = (replace(t, exact=np.asarray(to(t.exact * steps) / steps)) for t in r.table)
    return rotated(r, *table)
