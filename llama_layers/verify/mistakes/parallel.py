"""Partial sums that ranks add in too few bits."""

from __future__ import annotations

from dataclasses import replace

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.parallel.plan import SUMMED
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.mistakes.registry import Computed, Kind, mistake
from llama_layers.verify.mistakes.rounding import are_numbers_of, in_each_narrow_format
from llama_layers.verify.operations import Linear
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.ranks import parallel_profile


@in_each_narrow_format
def _parts_in(narrow: str) -> None:
    @mistake(
        Linear,
        f"parts of ranks added in {narrow}",
        roles=SUMMED,
        kind=Kind.ROUNDING,
        loosens=True,
        shows=lambda at, bound: are_numbers_of(narrow, at.computed),
        says=f"The port's numbers are all numbers of {narrow}, and as near as ranks come that "
        f"round their parts of the sum to it before they add them.",
    )
    def _(linear: Linear, at: FailingSite) -> Computable | None:
        ranks = parallel_profile(at.recorded.metadata)
        if ranks is None or FLOATS[narrow].precision >= FLOATS[at.formats.dtype].precision:
            return None

        def bound(how: Rounding) -> Bound:
            profile = replace(how.profile, ranks=ranks.ranks, reduce=narrow)
            return linear.bound(replace(how, profile=profile))

        return Computed(bound)
