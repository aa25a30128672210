"""RoPE in too few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from llama_layers.layers.rope import inv_freq
from llama_layers.verify.bounds import Bound
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.hypotheses.hypothesis import Change, Float64Array, Hypothesis, Kind, wide
from llama_layers.verify.hypotheses.rope import Turn, phases_of, rotate
from llama_layers.verify.operations import Formats, Rope

_NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def _narrow_phases(
    narrow: str,
) -> Callable[[Rope, FailingSite], Iterator[Turn]]:
    def changes(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
        dtype = _NARROW[narrow]
        positions = np.asarray(rope.positions, np.float64)[..., None, None]
        omega = inv_freq(rope.config, length=int(rope.positions.max()) + 1)
        for rounded in (
            _to(dtype, _to(dtype, positions) * _to(dtype, omega)),
            positions * _to(dtype, omega),
            _to(dtype, positions) * omega,
            _to(dtype, positions * omega),
            _to(dtype, positions) * _to(dtype, omega),
            _to(dtype, positions * _to(dtype, omega)),
        ):
            yield rotate(rope, rounded if rounded.ndim == 4 else rounded[None])

    return changes


def _narrow_table(narrow: str) -> Callable[[Rope, FailingSite], Iterator[Turn]]:
    def changes(rope: Rope, failing: FailingSite) -> Iterator[Turn]:
        table = rotate(rope, phases_of(rope))
        dtype = _NARROW[narrow]
        yield replace(table, cos=_to(dtype, table.cos), sin=_to(dtype, table.sin))

    return changes


@dataclass(frozen=True, eq=False)
class Coarse:
    """A rotation whose cosines and sines may be off by so much."""

    rope: Rope
    off: float

    def bound(self, formats: Formats) -> Bound:
        """The exact rotation, and what its limit and the table allow."""
        bound = self.rope.bound(formats)
        a, b = np.split(np.abs(wide(self.rope.x)), 2, axis=-1)
        more = self.off * np.concatenate([a + b, a + b], axis=-1)
        return replace(bound, limit=bound.limit + more, usual=bound.usual + more)


def _coarse_table(rope: Rope, failing: FailingSite) -> Iterator[Change]:
    for bits in (10, 8):
        yield Change(
            Coarse(rope, 2.0 ** -(bits + 1)),
            f"The port's cosines and sines seem to have {bits} bits after the point; they need "
            "float32 at the least.",
        )


def _to(dtype: Any, array: Float64Array) -> Float64Array:
    rounded: Float64Array = array.astype(np.float32).astype(dtype).astype(np.float64)
    return rounded


HYPOTHESES = (
    *(
        Hypothesis(
            f"RoPE phases in {narrow}",
            Rope,
            _narrow_phases(narrow),
            f"The port seems to compute positions, frequencies or phases in {narrow}; they need "
            "float32 at the least.",
            Kind.ROUNDING,
        )
        for narrow in ("bfloat16", "float16")
    ),
    *(
        Hypothesis(
            f"RoPE table in {narrow}",
            Rope,
            _narrow_table(narrow),
            f"The port seems to round cosines and sines to {narrow}.",
            Kind.ROUNDING,
        )
        for narrow in ("bfloat16", "float16")
    ),
    Hypothesis("RoPE table in few bits", Rope, _coarse_table, kind=Kind.SOLVED, loosens=True),
)
