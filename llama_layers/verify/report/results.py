"""The result of a check at one site."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama_layers.layers.sites import Site
from llama_layers.verify.judge import Judgement
from llama_layers.verify.place import Place
from llama_layers.verify.report.plain import plain
from llama_layers.verify.report.wording import apart, figure

SiteVerdict = Literal["PASS", "WARN", "FAIL", "SEEN", "DIFFERS"]
SITE_VERDICTS: tuple[SiteVerdict, ...] = get_args(SiteVerdict)

# Upper edges of the histogram's bins; the last bin holds everything larger.
EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)


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
        Its place in the array.
    computed, exact, limit : float
        The port's number, the exact one, and how far apart rounding allows them to be.
    """

    index: tuple[int, ...]
    computed: float
    exact: float
    limit: float

    @property
    def ratio(self) -> float:
        """The error over its limit, as `Bound.ratio` has it."""
        if self.computed == self.exact or math.isinf(self.limit):
            return 0.0
        if math.isnan(self.computed) and math.isnan(self.exact):
            return 0.0
        error = abs(self.computed - self.exact)
        return error / self.limit if self.limit and math.isfinite(error) else math.inf


@dataclass(frozen=True)
class SiteResult:
    """The result of a check at one site.

    Attributes
    ----------
    site : Site
        The site.
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
        A further remark, as a sentence; may be empty.
    profile : str
        The engine whose further roundings explain a WARN; empty if none were needed.
    histogram : tuple of int
        How many elements have which error over limit: see `EDGES`.
    worst : tuple of Element
        The elements with the largest error over limit, the worst first.
    place : Place or None
        Where the wrong elements of a FAIL or DIFFERS are. For DIFFERS they are those that err by
        more than 20 times the root mean square of our own run's errors at that token.
    explanations : tuple of Explanation
        Mistakes that would explain a FAIL or DIFFERS, the likeliest first; or a WARN, as well as
        the engine's roundings do.
    stopped : float or None
        After how many seconds the search for mistakes was stopped, where it had found none here;
        None where all were tried, or none had to be.
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
    place: Place | None = None
    explanations: tuple[Explanation, ...] = ()
    stopped: float | None = None

    def __repr__(self) -> str:
        return f"SiteResult({self.site.name}: {self.verdict}, error/limit {figure(self.ratio)})"

    @property
    def ratio(self) -> float:
        """The largest error over its limit; NaN where inputs were not recorded."""
        return math.nan if self.judgement is None else self.judgement.ratio

    @property
    def usual_ratio(self) -> float:
        """The largest error over what is usual; NaN where inputs were not recorded."""
        return math.nan if self.judgement is None else self.judgement.usual_ratio

    def what_is_wrong(self) -> str:
        """Say in words what is wrong: the worst element, or how far the whole differs."""
        if self.judgement is None:
            return self._difference_in_words()
        far = math.isfinite(self.ratio)
        size = f"error {figure(self.ratio)} times what" if far else "an error that no"
        where = f"at {list(self.judgement.index)}"
        if self.worst:
            port, exact = apart(self.worst[0].computed, self.worst[0].exact)
            where += f": port {port}, exact {exact}"
        return f"{size} rounding allows, {where}"

    def _difference_in_words(self) -> str:
        if math.isnan(self.difference):
            return "NaN or Inf, and nothing recorded before it has any"
        since = f" that starts from {', '.join(self.inputs)}" if self.inputs else ""
        if math.isinf(self.difference):
            return f"NaN or Inf where a recomputation{since} has none, or the reverse"
        own = "" if self.yardstick is None else f"; our own run differs by {figure(self.yardstick)}"
        return f"differs by {figure(self.difference)} from a recomputation{since}{own}"

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values; NaN and Inf become null.

        Returns
        -------
        dict
            The attributes.
        """
        content: dict[str, Any] = plain(self)
        return content
