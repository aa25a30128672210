"""What a check found: a result for each site, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_layers.verify.judge import Judgement
from llama_layers.verify.sites import Site

SiteVerdict = Literal["PASS", "WARN", "FAIL", "SEEN", "DIFFERS"]


@dataclass(frozen=True)
class Explanation:
    """A mistake that would explain a site.

    Attributes
    ----------
    name : str
        A few words: "RoPE layout interleaved".
    detail : str
        A sentence: what the port seems to do, and what it should.
    ratio : float
        The largest error over its limit when the site is recomputed with the mistake.
    """

    name: str
    detail: str
    ratio: float


@dataclass(frozen=True)
class Element:
    """One element of a site.

    Attributes
    ----------
    index : tuple of int
        Where.
    computed, exact, limit : float
        What the port has, what float64 gives, and how far apart rounding allows them to be.
    """

    index: tuple[int, ...]
    computed: float
    exact: float
    limit: float


@dataclass(frozen=True)
class SiteResult:
    """What a check found at one site.

    Attributes
    ----------
    site : Site
        Which.
    verdict : {"PASS", "WARN", "FAIL", "SEEN", "DIFFERS"}
        Where its inputs were recorded, as for `Judgement`, and WARN also where a persona's
        roundings explain it. Where they were not: whether it differs from a recomputation as our
        own run does (SEEN), or by far more (DIFFERS).
    shape : tuple of int
        Of the recorded array.
    dtype, accumulate : str
        The formats that the bound is for.
    inputs : tuple of str
        The recorded sites that it was recomputed from.
    judgement : Judgement or None
        The worst error over its bound; None where inputs were not recorded.
    difference : float
        The error of the whole array, relative: the root of the sum of squared errors over that of
        the squared exact values.
    yardstick : float or None
        The same of our own run in the port's dtype from the same inputs, where inputs were not
        recorded.
    note : str
        What else is to be said, as a sentence; may be empty.
    histogram : tuple of int
        How many elements have which error over limit: see `EDGES`.
    worst : tuple of Element
        The elements with the largest error over limit, the worst first.
    explanations : tuple of Explanation
        Mistakes that would explain a FAIL, the likeliest first.
    """

    site: Site
    verdict: SiteVerdict
    shape: tuple[int, ...]
    dtype: str
    accumulate: str
    inputs: tuple[str, ...]
    judgement: Judgement | None
    difference: float
    yardstick: float | None = None
    note: str = ""
    histogram: tuple[int, ...] = ()
    worst: tuple[Element, ...] = ()
    explanations: tuple[Explanation, ...] = ()


# Upper edges of the histogram's bins; the last bin, of what is larger still, has none.
EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)


@dataclass(frozen=True)
class Report:
    """What a check of a whole trace found.

    Attributes
    ----------
    results : tuple of SiteResult
        In the order of a forward pass, for every site that was recorded.
    missing : tuple of str
        Sites of the model that were not recorded; those of all pairs of tokens are not counted.
    metadata : mapping of str to str
        What the trace says of its origin.
    seconds : float
        How long the check took.
    """

    results: tuple[SiteResult, ...]
    missing: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def first_failure(self) -> SiteResult | None:
        """The first site that diverges, FAIL or DIFFERS; None if none does."""
        return next((r for r in self.results if r.verdict in ("FAIL", "DIFFERS")), None)

    @property
    def agrees(self) -> bool:
        """Whether no site diverges."""
        return self.first_failure is None

    def counts(self) -> dict[str, int]:
        """How many sites have each verdict.

        Returns
        -------
        dict of str to int
            For "PASS", "WARN", "FAIL", "SEEN" and "DIFFERS".
        """
        verdicts: tuple[SiteVerdict, ...] = ("PASS", "WARN", "FAIL", "SEEN", "DIFFERS")
        return {v: sum(r.verdict == v for r in self.results) for v in verdicts}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; NaN and Inf become strings.

        Returns
        -------
        dict
            One entry for each attribute, with the verdict and the first failure on top.
        """
        raise NotImplementedError
