"""The report of a check: a result for each site, and a verdict."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_layers.errors import escaped, one_line
from llama_layers.verify.report.blocks import (
    Block,
    Cause,
    Elements,
    Facts,
    Headline,
    Panel,
    Sentences,
    Strips,
    section,
)
from llama_layers.verify.report.logprobs import LogprobDifference
from llama_layers.verify.report.patterns import joined_causes
from llama_layers.verify.report.plain import as_json
from llama_layers.verify.report.remedy import Remedy
from llama_layers.verify.report.results import EDGES, SITE_VERDICTS, Explanation, SiteResult
from llama_layers.verify.report.tables import (
    element_rows,
    missing_sites,
    notes,
    places,
    role_tables,
    site_map,
    site_table,
    worst_elements,
)
from llama_layers.verify.report.text import Readable
from llama_layers.verify.report.wording import counted, ended, figure, roles_and_layers

# A sum that is rounded once can err by as much as rounding allows: its ratio is 1, or nearly.
_NEARLY = 0.9

ReportVerdict = Literal["PASS", "WARN", "FAIL", "SEEN", "NONE"]


@dataclass(frozen=True)
class Report(Readable):
    """The report of a check of a whole trace.

    Attributes
    ----------
    results : tuple of SiteResult
        In the order of a forward pass, for every site that was recorded.
    missing : tuple of str
        Sites of the model that were not recorded; those that are optional are not counted.
    metadata : mapping of str to str
        The metadata of the trace.
    seconds : float
        How long the check took.
    profile : str
        The engine whose further roundings were allowed; "contract" if none were.
    weights : str
        The dtype of the model's weights; may be empty.
    diagnosed : bool
        Whether explanations were looked for.
    remedies : tuple of Remedy
        Options of a check that allow what fails, if it is meant, the best first.
    logprobs : LogprobDifference or None
        How far the log-probabilities are from those of float64, if they were recorded.
    """

    results: tuple[SiteResult, ...]
    missing: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    profile: str = "contract"
    weights: str = ""
    diagnosed: bool = True
    remedies: tuple[Remedy, ...] = ()
    logprobs: LogprobDifference | None = None

    def __repr__(self) -> str:
        return f"Report({_headline(self)})"

    @property
    def verdict(self) -> ReportVerdict:
        """The verdict on the whole trace.

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
        """The exit status of a command that checks: 0 agrees, 1 does not, 2 nothing was checked."""
        return {"FAIL": 1, "NONE": 2}.get(self.verdict, 0)

    @property
    def failures(self) -> tuple[SiteResult, ...]:
        """The sites that fail or differ, in the order of a forward pass."""
        return tuple(result for result in self.results if result.verdict in ("FAIL", "DIFFERS"))

    @property
    def first(self) -> SiteResult | None:
        """The first site that fails or differs."""
        return next(iter(self.failures), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values; NaN and Inf become null.

        Returns
        -------
        dict
            The verdict, the exit status and the first failure first, then the attributes.
        """
        counts = Counter(result.verdict for result in self.results)
        return as_json(self, _headline(self)) | {
            "counts": {verdict: counts[verdict] for verdict in SITE_VERDICTS},
            "histogram_edges": list(EDGES),
        }

    def blocks(self) -> list[Block]:
        """Return the parts of the report, the verdict first."""
        results = self.results
        remarks = (tuple(notes(results)), tuple(missing_sites(results, self.missing)))
        return [
            _headline(self),
            *_first_failure(self),
            *section("Log-probabilities", self.logprobs.blocks() if self.logprobs else []),
            *section("Where they are wrong", _elsewhere(self.failures)),
            *_allowed(self),
            *section("Error over limit, by site and layer", [site_map(results)] if results else []),
            *section("How errors are spread", role_tables(results)),
            *section("All sites", [site_table(results)] if results else []),
            *section("Notes", (Sentences(said) for said in remarks if said)),
            *section("Worst elements", worst_elements(results)),
            *section("The check", [Sentences((_closing(self),))]),
            *section("What the trace says of itself", _metadata(self.metadata)),
        ]


def _headline(report: Report) -> Headline:
    """Tell the verdict and the first failure, or else the largest error, in a sentence."""
    first, verdict, count = report.first, report.verdict, counted(len(report.results), "site")
    if first is not None:
        said = f"first at {first.site.name}: {first.what_is_wrong()}"
    elif verdict == "NONE":
        said = f"nothing could be checked: of {count}, none has recorded inputs"
    elif verdict == "SEEN":
        said = f"{count}, none with recorded inputs; their errors look like those of rounding"
    elif verdict == "PASS":
        passed = sum(result.verdict == "PASS" for result in report.results)
        if passed < len(report.results):
            count = f"{passed} of {count}, the others without recorded inputs"
        worst = max(
            (result for result in report.results if result.judgement is not None),
            key=lambda result: result.ratio,
        )
        said = f"{count}; {_largest_error(worst.ratio, f', at {worst.site.name}')}"
    else:
        warned = [result for result in report.results if result.verdict == "WARN"]
        said = (
            f"none of {count} fails; {len(warned)} {'warns' if len(warned) == 1 else 'warn'}, "
            f"the first at {warned[0].site.name}: {warned[0].note}"
        )
    return Headline(verdict, said, "check of a trace")


def _largest_error(ratio: float, where: str = "") -> str:
    """Say how large errors are that rounding explains.

    One of nearly what rounding allows is no near miss: a correctly rounded sum can have it.
    """
    if _NEARLY < ratio <= 1:
        return "no error is larger than rounding allows"
    return f"the largest error is {figure(ratio)} times what rounding allows{where}"


def _elsewhere(failures: Sequence[SiteResult]) -> Iterator[Sentences]:
    """Say for each failing site where it is wrong, if there are others than the first."""
    if len(_places(failures)) > 1:
        yield Sentences(tuple(places(failures)))


def _places(failures: Sequence[SiteResult]) -> set[str]:
    """Return the places of failing sites in words, each once."""
    return {"" if result.place is None else result.place.words for result in failures}


def _first_failure(report: Report) -> Iterator[Panel]:
    """Show the first failure, what would explain it, and how many others there are."""
    first = report.first
    if first is None:
        return
    blocks: list[Block] = []
    if first.place is not None:
        blocks += (Sentences((f"Wrong: {ended(str(first.place))}",)), Strips(first.place.extents))
    tried = report.diagnosed and (first.judgement is not None or math.isfinite(first.difference))
    if tried and not first.explanations:
        blocks.append(Sentences((_unexplained(first),)))
    for i, explanation in enumerate(first.explanations):
        title = f"{'Or' if i else 'Likely cause'}: {explanation.name}"
        blocks.append(Cause(title, (explanation.detail, _remainder(first, explanation))))
    if report.remedies:
        blocks.append(Sentences(tuple(remedy.sentence for remedy in report.remedies)))
    if first.judgement is not None and first.note:
        blocks.append(Sentences((f"{first.note[0].upper()}{first.note[1:]}.",)))
    if first.judgement is None:
        said = "The sites between were not recorded; with them, the first wrong one would be found."
        blocks.append(Sentences((said,)))
    blocks.append(Sentences(tuple(_consequences(report.failures))))
    if together := tuple(joined_causes(report.failures)):
        others = "" if first.explanations else "Likely cause at other sites: "
        blocks.append(Sentences(tuple(others + said for said in together)))
    blocks.append(
        Facts(
            {
                "site": first.site.name,
                "recomputed from": ", ".join(first.inputs) or "input_ids",
                "shape": str(list(first.shape)),
                "computed in": f"{first.dtype}, sums in {first.accumulate}",
            }
        )
    )
    if first.worst:
        blocks.append(Elements("Its worst elements", element_rows(first.worst)))
    yield Panel(tuple(blocks))


def _unexplained(result: SiteResult) -> str:
    """Say that no mistake was found that explains a site, or that there was no time for all."""
    if result.stopped is None:
        return "No mistake that is known here explains it."
    return (
        f"The search for what explains it was stopped after {result.stopped:g} s, before all known "
        "mistakes were tried."
    )


def _allowed(report: Report) -> Iterator[Sentences]:
    """Say which option allows what warns, where nothing fails."""
    if report.first is None and report.remedies:
        yield Sentences(tuple(remedy.sentence for remedy in report.remedies))


def _remainder(result: SiteResult, explanation: Explanation) -> str:
    """Say in a sentence how much of the error a mistake leaves."""
    if result.judgement is not None:
        return f"So computed, {_largest_error(explanation.ratio)}."
    ratio = figure(explanation.ratio)
    return f"So computed, it differs by {ratio} times what would still be SEEN."


def _consequences(failures: tuple[SiteResult, ...]) -> Iterator[str]:
    """Say how many sites fail, and how many of them the first one's likeliest cause explains."""
    if len(failures) == 1:
        yield "No other site fails."
        return
    where = ", in the same places" if len(_places(failures)) == 1 and failures[0].place else ""
    names = roles_and_layers(result.site for result in failures)
    yield f"{len(failures)} sites fail{where}: {names}."
    if failures[0].explanations:
        name = failures[0].explanations[0].name
        others = [r.site for r in failures if name not in {e.name for e in r.explanations}]
        explains = "all of them"
        if others:
            count = len(failures) - len(others)
            explains = f"{count} of them; not {roles_and_layers(others)}"
        yield f"The likely cause explains {explains}."


def _closing(report: Report) -> str:
    """Say how many sites were checked, how fast, and in which formats."""
    formats = Counter((result.dtype, result.accumulate) for result in report.results)
    said = "; ".join(
        f"{dtype} with sums in {accumulate}"
        + (f" at {counted(count, 'site')}" if len(formats) > 1 else "")
        for (dtype, accumulate), count in formats.most_common()
    )
    profile = "" if report.profile == "contract" else f", with the roundings of {report.profile}"
    sites = counted(len(report.results), "site")
    weights = f", from weights in {report.weights}" if report.weights else ""
    return f"{sites} checked in {report.seconds:.1f} s as {said}{weights}{profile}."


def _metadata(metadata: Mapping[str, str]) -> Iterator[Facts]:
    """Tell the metadata of a trace, with its control characters escaped."""
    if metadata:
        yield Facts({one_line(name): escaped(_laid_out(text)) for name, text in metadata.items()})


def _laid_out(text: str) -> str:
    """Put spaces into JSON, so that lines can be broken; leave other text as it is."""
    try:
        return json.dumps(json.loads(text)) if text.startswith("{") else text
    except (ValueError, RecursionError):
        return text
