"""A check's report as plain text: the verdict first, and what explains it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

from llama_layers.verify.layout import apart, counted, figure, paragraph, table, wrapped
from llama_layers.verify.report import SITE_VERDICTS, Explanation, Report, SiteResult
from llama_layers.verify.sites import Site
from llama_layers.verify.summary import RoleSummary, by_role, grouped, layer_ranges

UNEXPLAINED = "No mistake that is known here explains it."
LEGEND = "Beyond 1 no rounding explains it. What is rounded once, as a sum, can reach 1.00."
UNLOCATED = "The sites between were not recorded; with them, the first wrong one would be found."


def report_text(report: Report, *, every: bool, width: int) -> str:
    """All of a report: `Report.text` says what the arguments are."""
    parts = [
        wrapped(headline(report), width),
        *causes(report, width),
        consequences(report, width),
        _roles(report, width),
        _unjudged(report),
        _sites(report) if every else "",
        "\n".join(wrapped(note, width) for note in notes(report)),
        "\n".join(wrapped(line, width) for line in missing_sites(report)),
        wrapped(_closing(report), width),
    ]
    return "\n\n".join(part for part in parts if part)


def headline(report: Report) -> str:
    """The verdict and the first failure, or else the largest error, in a sentence."""
    count = counted(len(report.results), "site")
    if report.first is not None:
        return f"FAIL: first at {report.first.site.name}: {what_is_wrong(report.first)}"
    if report.verdict == "NONE":
        return f"NONE: nothing could be checked: of {count}, none has recorded inputs"
    if report.verdict == "SEEN":
        return f"SEEN: {count}, none with recorded inputs; their errors look like those of rounding"
    worst = max(
        (r for r in report.results if r.judgement is not None),
        key=lambda r: r.judgement.ratio if r.judgement else 0.0,
    )
    if report.verdict == "PASS":
        passed = sum(result.verdict == "PASS" for result in report.results)
        if passed < len(report.results):
            count = f"{passed} of {count}, the others without recorded inputs"
        return f"PASS: {count}; {largest_error(worst)}"
    warned = [result for result in report.results if result.verdict == "WARN"]
    warn = "warns" if len(warned) == 1 else "warn"
    return (
        f"WARN: none of {count} fails; {len(warned)} {warn}, the first at "
        f"{warned[0].site.name}: {warned[0].note}"
    )


def largest_error(worst: SiteResult) -> str:
    """The largest error of a report, in words."""
    assert worst.judgement is not None  # who asks has chosen among those
    return (
        f"the largest error is {figure(worst.judgement.ratio)} times what rounding allows, at "
        f"{worst.site.name}"
    )


def what_is_wrong(result: SiteResult) -> str:
    """The worst element of a failure, or how far it differs, in words."""
    if result.judgement is None:
        if math.isnan(result.difference):
            return "NaN or Inf, and nothing recorded before it has any"
        since = f" since {', '.join(result.inputs)}" if result.inputs else ""
        if math.isinf(result.difference):
            return f"NaN or Inf where a recomputation{since} has none, or the reverse"
        own = "" if result.yardstick is None else f", our own run by {figure(result.yardstick)}"
        return f"differs by {figure(result.difference)} from a recomputation{since}{own}"
    ratio = result.judgement.ratio
    size = f"error {figure(ratio)} times what" if math.isfinite(ratio) else "an error that no"
    where = f"at {list(result.judgement.index)}"
    if result.worst:
        port, exact = apart(result.worst[0].computed, result.worst[0].exact)
        where += f": port {port}, exact {exact}"
    return f"{size} rounding allows, {where}"


def causes(report: Report, width: int) -> Iterator[str]:
    """What would explain the first failure."""
    first = report.first
    if first is None:
        return
    if is_unexplained(report, first):
        yield UNEXPLAINED
    for i, explanation in enumerate(first.explanations):
        lines = (
            wrapped(f"{'Or' if i else 'Likely cause'}: {explanation.name}", width),
            paragraph(explanation.detail, width),
            paragraph(so_computed(first, explanation), width),
        )
        yield "\n".join(line for line in lines if line)
    if first.judgement is None:
        yield wrapped(UNLOCATED, width)


def is_unexplained(report: Report, first: SiteResult) -> bool:
    """Whether mistakes were tried on a failure, and none explains it."""
    tried = report.diagnosed and (first.judgement is not None or math.isfinite(first.difference))
    return tried and not first.explanations


def so_computed(result: SiteResult, explanation: Explanation) -> str:
    """What a mistake leaves, as a sentence."""
    ratio = figure(explanation.ratio)
    if result.judgement is None:
        return f"So computed, it differs by {ratio} times what would still be SEEN."
    return f"So computed, the largest error is {ratio} times what rounding allows."


def consequences(report: Report, width: int) -> str:
    """How many sites fail, and how many of them the first one's likeliest cause explains."""
    failures = report.failures
    if not failures:
        return ""
    if len(failures) == 1:
        return "No other site fails."
    where = ", ".join(roles_and_layers(failure.site for failure in failures))
    lines = [wrapped(f"{len(failures)} sites fail: {where}.", width)]
    first = failures[0]
    if first.explanations:
        name = first.explanations[0].name
        others = [r.site for r in failures if name not in {e.name for e in r.explanations}]
        explains = (
            f"{len(failures) - len(others)} of them; not {', '.join(roles_and_layers(others))}"
            if others
            else "all of them"
        )
        lines.append(wrapped(f"The likely cause explains {explains}.", width))
    return "\n".join(lines)


def role_name(role: str) -> str:
    """A role in words; what is called "layer" is the layer's own output."""
    return "layer output" if role == "layer" else role


def roles_and_layers(sites: Iterable[Site]) -> list[str]:
    """Which sites, in few words: self_attn.q_rope in layers 0-3, 7."""
    return [
        _in_layers(role, [site.layer for site in found])
        for role, found in grouped(sites, lambda site: site.role).items()
    ]


def _in_layers(role: str, layers: Iterable[int | None]) -> str:
    numbers = [layer for layer in layers if layer is not None]
    if not numbers:
        return role_name(role)
    word = "layer" if len(numbers) == 1 else "layers"
    return f"{role_name(role)} in {word} {layer_ranges(numbers)}"


def _roles(report: Report, width: int) -> str:
    """A line for each role with a limit, with its verdicts and its largest error."""
    shown = [summary for summary in by_role(report.results) if summary.worst is not None]
    if not shown:
        return ""
    verdicts = [v for v in SITE_VERDICTS if any(summary.counts[v] for summary in shown)]
    rows = [["site", *verdicts, "error/limit", "error/usual", "layer"]]
    rows += [[role_name(s.role), *_counts(s, verdicts), *_worst(s)] for s in shown]
    return f"{table(rows)}\n{wrapped(LEGEND, width)}"


def _counts(summary: RoleSummary, verdicts: Iterable[str]) -> list[str]:
    return [str(summary.counts[verdict] or "") for verdict in verdicts]


def _worst(summary: RoleSummary) -> list[str]:
    worst, usual = summary.worst, summary.usual
    if worst is None or usual is None or worst.judgement is None or usual.judgement is None:
        return ["", "", ""]
    # Of a role that warns, the layer that warns the most is worth knowing.
    layer = (usual if worst.judgement.ratio <= 1 < usual.judgement.usual_ratio else worst).site
    return [
        figure(worst.judgement.ratio),
        figure(usual.judgement.usual_ratio),
        "" if layer.layer is None else str(layer.layer),
    ]


def _unjudged(report: Report) -> str:
    """A line for each role of which sites have no limit."""
    shown = [s for s in by_role(report.results) if s.farthest is not None]
    if not shown:
        return ""
    verdicts = [v for v in ("SEEN", "DIFFERS") if any(s.counts[v] for s in shown)]
    rows = [["without recorded inputs", *verdicts, "difference", "our own run", "layer"]]
    for summary in shown:
        far = summary.farthest
        assert far is not None
        rows.append(
            [
                role_name(summary.role),
                *_counts(summary, verdicts),
                "unknown" if math.isnan(far.difference) else figure(far.difference),
                "" if far.yardstick is None else figure(far.yardstick),
                "" if far.site.layer is None else str(far.site.layer),
            ]
        )
    return table(rows)


def _sites(report: Report) -> str:
    """A line for each site."""
    rows = [["site", "verdict", "error/limit", "error/usual", "difference", "at"]]
    for result in report.results:
        judgement = result.judgement
        ratios = (
            ["", ""]
            if judgement is None
            else [figure(judgement.ratio), figure(judgement.usual_ratio)]
        )
        at = "" if judgement is None else str(list(judgement.index))
        rows.append(
            [result.site.name, result.verdict, *ratios, figure(result.difference), at],
        )
    return table(rows, left=(0, 1, 5))


def notes(report: Report) -> Iterator[str]:
    """What is said of sites, once each, and of which."""
    noted = (result for result in report.results if result.note)
    for (verdict, note), results in grouped(noted, lambda r: (r.verdict, r.note)).items():
        yield f"{verdict} {', '.join(roles_and_layers(r.site for r in results))}: {note}."


def missing_sites(report: Report) -> Iterator[str]:
    """The sites that were not recorded: a line for all roles that lack the same layers."""
    recorded = {result.site.name for result in report.results}
    split = [_split(name) for name in report.missing]
    layers = {layer for layer, _ in map(_split, recorded | set(report.missing))} - {None}
    lacking = {
        role: tuple(layer for layer, _ in found if layer is not None)
        for role, found in grouped(split, lambda pair: pair[1]).items()
    }
    for numbers, roles in grouped(lacking, lambda role: lacking[role]).items():
        names = ", ".join(map(role_name, roles))
        if not numbers:
            yield f"Not recorded: {names}."
        elif len(numbers) == len(layers):
            yield f"Not recorded in any of {counted(len(layers), 'layer')}: {names}."
        else:
            word = "layer" if len(numbers) == 1 else "layers"
            yield f"Not recorded in {word} {layer_ranges(numbers)}: {names}."


def _split(name: str) -> tuple[int | None, str]:
    """The layer and the role of a site."""
    if not name.startswith("model.layers."):
        return None, name
    number, _, role = name.removeprefix("model.layers.").partition(".")
    return int(number), role or "layer"


def _closing(report: Report) -> str:
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
