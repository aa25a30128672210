"""What a benchmark found, and the arithmetic of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llama_layers.bench.contestants import OURS
from llama_layers.bench.cost import Cost

FORMAT = 1


@dataclass(frozen=True)
class Limit:
    """How fast the machine did one thing, in each try; the best counts."""

    what: str
    rates: list[float]

    @property
    def best(self) -> float:
        """Bytes or operations a second."""
        return max(self.rates)


@dataclass(frozen=True)
class Case:
    """The times of one size.

    Attributes
    ----------
    name : str
        Such as "S = 8".
    cost : Cost
        Of one unit: a product, a layer, a token or a prompt.
    tokens : int or None
        Tokens of a unit, where a rate of them says something.
    seconds : dict of str to list of float
        Of one unit, by contestant, in each round.
    """

    name: str
    cost: Cost
    tokens: int | None
    seconds: dict[str, list[float]]

    def best(self, name: str) -> float:
        """The shortest time of a contestant."""
        return min(self.seconds[name])

    def median(self, name: str) -> float:
        """The median time of a contestant."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str) -> tuple[float, float]:
        """Best and median of a contestant over ours: above 1 where ours are shorter."""
        return self.best(name) / self.best(OURS), self.median(name) / self.median(OURS)


@dataclass(frozen=True)
class Result:
    """A benchmark.

    Attributes
    ----------
    title : str
        What was measured.
    threads : int or None
        Of every contestant; None on a GPU.
    machine : dict of str to str
        Processor, system and versions.
    reading, multiplying : Limit
        What the machine did in the same run.
    numbers : dict of str to str
        The formats that each contestant stores and computes in; ours first.
    cases : list of Case
        One for each size.
    """

    title: str
    threads: int | None
    machine: dict[str, str]
    reading: Limit
    multiplying: Limit
    numbers: dict[str, str]
    cases: list[Case]

    @property
    def rounds(self) -> int:
        """How many times each was timed."""
        return len(self.cases[0].seconds[OURS])

    def limit(self, case: Case) -> tuple[float, Literal["reading", "multiplying"]]:
        """The seconds that a unit takes at the least, and by which of the limits."""
        reading = case.cost.nbytes / self.reading.best
        multiplying = case.cost.flops / self.multiplying.best
        if reading >= multiplying:
            return reading, "reading"
        return multiplying, "multiplying"

    def share(self, case: Case, name: str) -> float:
        """The part of the limit's speed that a contestant's best time reached."""
        return self.limit(case)[0] / case.best(name)

    def to_json(self) -> dict[str, Any]:
        """For a program to read: all that is held, and what follows from it."""
        content = {"format": FORMAT, **asdict(self)}
        for case, held in zip(self.cases, content["cases"], strict=True):
            seconds, limit = self.limit(case)
            held["limit"] = {"seconds": seconds, "by": limit}
            held["summary"] = {name: self._summary(case, name) for name in case.seconds}
        return content

    def _summary(self, case: Case, name: str) -> dict[str, float]:
        best, median = case.ratios(name)
        return {
            "best": case.best(name),
            "median": case.median(name),
            "share_of_limit": self.share(case, name),
            "best_over_ours": best,
            "median_over_ours": median,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """What `to_json` gave; what follows from the rest is not read."""
        if content.get("format") != FORMAT:
            raise ValueError(
                f"expected a benchmark of format {FORMAT}, got {content.get('format')!r}"
            )
        return cls(
            title=content["title"],
            threads=content["threads"],
            machine=content["machine"],
            reading=Limit(**content["reading"]),
            multiplying=Limit(**content["multiplying"]),
            numbers=content["numbers"],
            cases=[
                Case(case["name"], Cost(**case["cost"]), case["tokens"], case["seconds"])
                for case in content["cases"]
            ],
        )
