"""Which mistake would explain a site that rounding does not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from llama_layers.llama import Llama
from llama_layers.verify.operations import Formats, Operation
from llama_layers.verify.report import Explanation
from llama_layers.verify.sites import Site
from llama_layers.verify.validate import Recorded


@dataclass(frozen=True, eq=False)
class Suspect:
    """A site that failed, with all that could tell why.

    Attributes
    ----------
    site : Site
        Which.
    operation : Operation
        What it should be.
    computed : ndarray
        What the port has there.
    formats : Formats
        In which formats it computes.
    recorded : Recorded
        The port's other arrays.
    model : Llama
        The model's other weights.
    """

    site: Site
    operation: Operation
    computed: NDArray[Any]
    formats: Formats
    recorded: Recorded
    model: Llama


def diagnose(
    suspect: Suspect, /, *, only: Collection[str] | None = None
) -> tuple[Explanation, ...]:
    """The mistakes that would explain a suspect, the likeliest first."""
    return ()
