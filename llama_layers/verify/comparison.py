"""What a comparison of two traces found: a difference for each site, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_layers.verify.plain import plain
from llama_layers.verify.sites import Site

# A site is a suspect if it differs by more than so many times what it inherits and may round.
SUSPECT = 10.0


@dataclass(frozen=True)
class SiteDifference:
    """How far two traces are apart at one site.

    Attributes
    ----------
    site : Site
        Which.
    dtypes : tuple of str
        What each trace computed it in.
    difference : float
        The root of the sum of squared differences over that of the first trace's squares; Inf
        where one is NaN or Inf and the other is not.
    inputs : tuple of str
        The nearest sites that it is computed from and that both traces have.
    inherited : float
        The largest difference at those; 0 where there are only the tokens.
    roundoff : float
        The unit roundoff of the coarser of the two formats, times the root of the number of
        operations since those inputs.
    identical : bool
        Whether both traces have the same bits in the same dtype.
    odd : int
        How many numbers are NaN or Inf in either trace.
    """

    site: Site
    dtypes: tuple[str, str]
    difference: float
    inputs: tuple[str, ...]
    inherited: float
    roundoff: float
    identical: bool = False
    odd: int = 0

    @property
    def added(self) -> float:
        """How much of the difference is not inherited."""
        return 0.0 if math.isinf(self.inherited) else max(0.0, self.difference - self.inherited)

    @property
    def factor(self) -> float:
        """The difference over what it inherits and may round."""
        if math.isinf(self.inherited):
            return 1.0
        return self.difference / (self.inherited + self.roundoff)

    @property
    def suspect(self) -> bool:
        """Whether the difference is much more than what it inherits and may round."""
        return self.factor > SUSPECT


@dataclass(frozen=True)
class Comparison:
    """Where two traces are apart.

    Attributes
    ----------
    results : tuple of SiteDifference
        In the order of a forward pass, for every site that both have.
    only_a, only_b : tuple of str
        Sites that one of them has.
    same_tokens : bool
        Whether both say that they are of the same `input_ids`; if not, that was taken for granted.
    metadata_a, metadata_b : mapping of str to str
        What the traces say of their origin.
    """

    results: tuple[SiteDifference, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    same_tokens: bool = True
    metadata_a: Mapping[str, str] = field(default_factory=dict)
    metadata_b: Mapping[str, str] = field(default_factory=dict)

    @property
    def suspects(self) -> tuple[SiteDifference, ...]:
        """The sites that add much more than what they inherit and may round."""
        return tuple(result for result in self.results if result.suspect)

    @property
    def first(self) -> SiteDifference | None:
        """The first suspect."""
        return next(iter(self.suspects), None)

    @property
    def agrees(self) -> bool:
        """Whether there is no suspect."""
        return self.first is None

    @property
    def verdict(self) -> Literal["AGREE", "DIVERGE"]:
        """AGREE without a suspect, else DIVERGE."""
        return "AGREE" if self.agrees else "DIVERGE"

    @property
    def exit_status(self) -> int:
        """Of a command that compares: 0 agree, 1 diverge."""
        return 0 if self.agrees else 1

    def __str__(self) -> str:
        return self.text()

    def text(self, *, every: bool = False, width: int = 80) -> str:
        """The comparison for people to read.

        Parameters
        ----------
        every : bool, optional
            Whether to print a line for each site, not only for each role.
        width : int, optional
            How many columns the lines may take, where they can be broken.

        Returns
        -------
        str
            Without a line break at the end.
        """
        from llama_layers.verify.compare_text import comparison_text

        return comparison_text(self, every=every, width=width)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values; NaN and Inf become strings.

        Returns
        -------
        dict
            The verdict, the exit status and the first suspect first, then the attributes.
        """
        from llama_layers.verify.compare_text import headline

        return {
            "verdict": self.verdict,
            "agrees": self.agrees,
            "exit_status": self.exit_status,
            "headline": headline(self),
            "first": None if self.first is None else _result_json(self.first),
            **plain(self),
            "results": [_result_json(result) for result in self.results],
        }


def _result_json(result: SiteDifference) -> dict[str, Any]:
    content: dict[str, Any] = plain(result)
    content["site"]["role"] = result.site.role
    derived = {"added": result.added, "factor": result.factor, "suspect": result.suspect}
    return content | {name: plain(value) for name, value in derived.items()}
