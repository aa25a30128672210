"""The times of a benchmark, and the arithmetic on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llama_layers.bench.cost import Cost
from llama_layers.bench.own_engine import NAME

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
    """The times of one size."""

    name: str
    """For example "S = 8"."""
    cost: Cost
    """The cost of one unit: a product, a layer, a token or a prompt."""
    tokens: int | None
    """Tokens of a unit, where a rate of them means something."""
    seconds: dict[str, list[float]]
    """Seconds of one unit, by engine, in each round."""

    def best(self, name: str) -> float:
        """The shortest time of an engine."""
        return min(self.seconds[name])

    def median(self, name: str) -> float:
        """The median time of an engine."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str) -> tuple[float, float]:
        """Divide best and median of an engine by ours: above 1 where ours is shorter."""
        return self.best(name) / self.best(NAME), self.median(name) / self.median(NAME)


@dataclass(frozen=True)
class Result:
    """A benchmark."""

    title: str
    threads: int | None
    """Threads of every engine; None on a GPU."""
    machine: dict[str, str]
    """Processor, system and versions."""
    reading: Limit
    multiplying: Limit
    """Both limits were probed in the same run."""
    numbers: dict[str, str]
    """The formats that each engine stores and computes in; ours first."""
    cases: list[Case]
    """One for each size."""

    @property
    def rounds(self) -> int:
        """How often each engine was timed."""
        return len(self.cases[0].seconds[NAME])

    def limit(self, case: Case) -> tuple[float, Literal["reading", "multiplying"]]:
        """Return the least seconds that a unit takes, and the limit that says so."""
        reading = case.cost.nbytes / self.reading.best
        multiplying = case.cost.flops / self.multiplying.best
        if reading >= multiplying:
            return reading, "reading"
        return multiplying, "multiplying"

    def share(self, case: Case, name: str) -> float:
        """Divide the limit by the best time of an engine."""
        return self.limit(case)[0] / case.best(name)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON: all fields, and what follows from them."""
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
        """Read what `to_json` gave, without what follows from the rest."""
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
