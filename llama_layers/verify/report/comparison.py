"""The result of comparing two traces: a difference for each site, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_layers.layers.sites import Site
from llama_layers.verify.report.blocks import Block, Headline, Sentences, Table, section
from llama_layers.verify.report.logprobs import LogprobDifference
from llama_layers.verify.report.plain import as_json, plain
from llama_layers.verify.report.text import Readable
from llama_layers.verify.report.wording import (
    counted,
    figure,
    grouped,
    layer_of,
    role_name,
    roles_and_layers,
)

# A site is a suspect if it differs by more than this many times what it inherits and may round.
SUSPECT = 10.0


@dataclass(frozen=True)
class SiteDifference:
    """How far two traces are apart at one site.

    Attributes
    ----------
    site : Site
        The site.
    dtypes : tuple of str
        The dtype in each trace.
    difference : float
        The norm of a token's difference over its norm in the first trace, as the root mean square
        over tokens; Inf where one is NaN or Inf and the other is not.
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

    def __repr__(self) -> str:
        return f"SiteDifference({self.site.name}: {figure(self.difference)})"

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

    def what_is_wrong(self) -> str:
        """Say in words how far the traces differ."""
        if math.isinf(self.difference) and self.odd:
            return f"NaN or Inf in one trace and not in the other; inputs: {', '.join(self.inputs)}"
        return (
            f"difference {figure(self.difference)}, {figure(self.factor)} times what it inherits "
            f"from {', '.join(self.inputs)} ({figure(self.inherited)}) and may round "
            f"({figure(self.roundoff)})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values; NaN and Inf become null.

        Returns
        -------
        dict
            The attributes, and what follows from them.
        """
        content: dict[str, Any] = plain(self)
        derived = {"added": self.added, "factor": self.factor, "suspect": self.suspect}
        return content | {name: plain(value) for name, value in derived.items()}


@dataclass(frozen=True)
class Comparison(Readable):
    """The result of comparing two traces.

    Attributes
    ----------
    results : tuple of SiteDifference
        In the order of a forward pass, for every site that both have.
    only_a, only_b : tuple of str
        Sites that one of them has.
    same_tokens : bool
        Whether both say that they are of the same `input_ids`; if not, that was taken for granted.
    metadata_a, metadata_b : mapping of str to str
        The metadata of the traces.
    logprobs : LogprobDifference or None
        How far the log-probabilities differ, if both have them and `input_ids`.
    """

    results: tuple[SiteDifference, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    same_tokens: bool = True
    metadata_a: Mapping[str, str] = field(default_factory=dict)
    metadata_b: Mapping[str, str] = field(default_factory=dict)
    logprobs: LogprobDifference | None = None

    def __repr__(self) -> str:
        return f"Comparison({_headline(self)})"

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
        """The exit status of a command that compares: 0 agree, 1 diverge."""
        return 0 if self.agrees else 1

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON values; NaN and Inf become null.

        Returns
        -------
        dict
            The verdict, the exit status and the first suspect first, then the attributes.
        """
        return as_json(self, _headline(self))

    def blocks(self) -> list[Block]:
        """Return the parts of the comparison, the verdict first."""
        return [
            _headline(self),
            *_suspects(self.suspects),
            *section("Log-probabilities", self.logprobs.blocks() if self.logprobs else []),
            *section("Differences by role", [_role_table(self.results)]),
            *section("All sites", [_site_table(self.results)]),
            *section("Notes", [Sentences(tuple(_remarks(self)))]),
        ]


def _headline(comparison: Comparison) -> Headline:
    """Tell the verdict and the first suspect, or else the largest difference, in a sentence."""
    first, sites = comparison.first, counted(len(comparison.results), "site")
    if first is not None:
        said = f"first at {first.site.name}: {first.what_is_wrong()}"
    elif all(result.identical for result in comparison.results):
        said = f"{sites}, bitwise equal"
    else:
        largest = max(comparison.results, key=lambda result: result.difference)
        amplifies = max(comparison.results, key=lambda result: result.factor)
        said = (
            f"{sites}; the largest difference is {figure(largest.difference)}, at "
            f"{largest.site.name}; none differs by more than {figure(amplifies.factor)} times what "
            "it inherits and may round"
        )
    return Headline(comparison.verdict, said, "comparison of two traces")


def _suspects(suspects: Sequence[SiteDifference]) -> Iterator[Sentences]:
    if len(suspects) == 1:
        yield Sentences(("No other site is suspect.",))
    elif suspects:
        where = roles_and_layers(result.site for result in suspects)
        yield Sentences((f"{len(suspects)} sites are suspect: {where}.",))


def _role_table(results: Sequence[SiteDifference]) -> Table:
    """Make a line for each role, with its largest difference and the site that adds the most."""
    rows = [["site", "sites", "suspect", "difference", "layer", "factor", "layer"]]
    for role, found in grouped(results, lambda result: result.site.inside).items():
        largest = max(found, key=lambda result: result.difference)
        amplifies = max(found, key=lambda result: result.factor)
        rows.append(
            [
                role_name(role),
                str(len(found)),
                str(sum(result.suspect for result in found) or ""),
                figure(largest.difference),
                layer_of(largest.site),
                figure(amplifies.factor),
                layer_of(amplifies.site),
            ]
        )
    return Table(rows)


def _site_table(results: Sequence[SiteDifference]) -> Table:
    """Make a line for each site."""
    rows = [["site", "suspect", "difference", "inherited", "added", "factor"]]
    for result in results:
        numbers = (result.difference, result.inherited, result.added, result.factor)
        rows.append([result.site.name, "yes" if result.suspect else "", *map(figure, numbers)])
    return Table(rows, long=True)


def _remarks(comparison: Comparison) -> Iterator[str]:
    """Say what else is to be known."""
    dtypes = grouped(comparison.results, lambda result: result.dtypes)
    yield (
        "Computed in "
        + "; ".join(
            (a if a == b else f"{a} and {b}")
            + (f" at {counted(len(results), 'site')}" if len(dtypes) > 1 else "")
            for (a, b), results in dtypes.items()
        )
        + "."
    )
    odd = [result for result in comparison.results if result.odd and not result.suspect]
    if odd:
        where = roles_and_layers(result.site for result in odd)
        yield f"NaN or Inf at {counted(len(odd), 'site')}, alike in both or inherited: {where}."
    if not comparison.same_tokens:
        yield "Not both traces have input_ids: they were taken to be of the same tokens."
    for which, names in (("first", comparison.only_a), ("second", comparison.only_b)):
        if names:
            yield f"Only in the {which} trace: {_names(names)}."
    yield (
        f"A suspect differs by more than {SUSPECT:g} times what it inherits and may round. That is "
        "experience, not a bound: check, with a model, has one for each element."
    )


def _names(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
