"""What a check found: a result for each site, and what they come to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from llama_layers.verify.judge import Judgement
from llama_layers.verify.plain import plain
from llama_layers.verify.sites import Site

SiteVerdict = Literal["PASS", "WARN", "FAIL", "SEEN", "DIFFERS"]
ReportVerdict = Literal["PASS", "WARN", "FAIL", "SEEN", "NONE"]
SITE_VERDICTS: tuple[SiteVerdict, ...] = get_args(SiteVerdict)


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
        The largest error over its limit when the site is recomputed with the mistake. Where its
        inputs were not recorded: the difference that is left, over the largest that is SEEN.
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
        Where its inputs were recorded, as for `Judgement`, and WARN also where a profile's
        roundings explain it. Where they were not: whether it differs from a recomputation as our
        own run does (SEEN), or by far more (DIFFERS); or, where nothing was recorded to recompute
        it from, whether it has NaN or Inf that the model does not (DIFFERS).
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
    profile : str
        The engine whose further roundings explain a WARN; empty if none was needed.
    histogram : tuple of int
        How many elements have which error over limit: see `EDGES`.
    worst : tuple of Element
        The elements with the largest error over limit, the worst first.
    explanations : tuple of Explanation
        Mistakes that would explain a FAIL or DIFFERS, the likeliest first.
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
    profile: str = ""
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
    profile : str
        The engine whose further roundings were allowed; "contract" if none were.
    weights : str
        The dtype of the model's weights; may be empty.
    diagnosed : bool
        Whether explanations were looked for.
    """

    results: tuple[SiteResult, ...]
    missing: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    profile: str = "contract"
    weights: str = ""
    diagnosed: bool = True

    @property
    def verdict(self) -> ReportVerdict:
        """What the results come to.

        FAIL if a site fails or differs, else WARN if one warns, else PASS if one passes. Where no
        site could be held against a bound: SEEN, or NONE if nothing was compared with anything.
        """
        found = {result.verdict for result in self.results}
        if found & {"FAIL", "DIFFERS"}:
            return "FAIL"
        if "WARN" in found:
            return "WARN"
        if "PASS" in found:
            return "PASS"
        compared = any(not math.isnan(result.difference) for result in self.results)
        return "SEEN" if compared else "NONE"

    @property
    def agrees(self) -> bool:
        """Whether something was compared, and no site fails or differs."""
        return self.verdict in ("PASS", "WARN", "SEEN")

    @property
    def exit_status(self) -> int:
        """Of a command that checks: 0 agrees, 1 does not, 2 nothing could be checked."""
        return {"FAIL": 1, "NONE": 2}.get(self.verdict, 0)

    @property
    def failures(self) -> tuple[SiteResult, ...]:
        """The sites that fail or differ, in the order of a forward pass."""
        return tuple(result for result in self.results if result.verdict in ("FAIL", "DIFFERS"))

    @property
    def first(self) -> SiteResult | None:
        """The first site that fails or differs."""
        return next(iter(self.failures), None)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, every: bool = False, width: int = 80) -> str:
        """The report for people to read.

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
        from llama_layers.verify.text import report_text

        return report_text(self, every=every, width=width)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; NaN and Inf become strings.

        Returns
        -------
        dict
            The verdict, the exit status and the first failure first, then the attributes.
        """
        from llama_layers.verify.text import headline

        counts = Counter(result.verdict for result in self.results)
        return {
            "verdict": self.verdict,
            "agrees": self.agrees,
            "exit_status": self.exit_status,
            "headline": headline(self),
            "first": None if self.first is None else _result_json(self.first),
            "counts": {verdict: counts[verdict] for verdict in SITE_VERDICTS},
            "profile": self.profile,
            "weights": self.weights,
            "diagnosed": self.diagnosed,
            "seconds": self.seconds,
            "metadata": dict(self.metadata),
            "missing": list(self.missing),
            "histogram_edges": list(EDGES),
            "results": [_result_json(result) for result in self.results],
        }


def _result_json(result: SiteResult) -> dict[str, Any]:
    content: dict[str, Any] = plain(result)
    content["site"]["role"] = result.site.role
    return content
