"""Results of trials of bodies on this machine, kept in the cache directory."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_layers.backends import machine
from llama_layers.files.output import cache_directory, write_atomically


@dataclass(frozen=True)
class TrialResult:
    """Whether a body was within the bound of its definition."""

    ratio: float | None
    """The largest error over its limit; None if the body raised."""
    problem: str | None = None
    """Why it is not used."""

    @property
    def passed(self) -> bool:
        """Whether the body may be used."""
        return self.problem is None


class TrialResults:
    """Results of trials for a library's arrays, in a file named after what they depend on.

    A file that cannot be read or makes no sense counts as empty. If none can be written, each
    process tries the bodies again.
    """

    def __init__(self, library: str) -> None:
        self._facts = machine.describe(library)
        key = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:24]
        self._path = cache_directory() / "bodies" / f"{library}-{key}.json"
        self._known = _read(self._path)

    def get(self, body: str) -> TrialResult | None:
        """The result of a body's trial, if it is known."""
        return self._known.get(body)

    def put(self, body: str, result: TrialResult) -> None:
        """Remember it, beside what other processes may have found since."""
        self._known = _read(self._path) | self._known | {body: result}
        content = {
            "machine": self._facts,
            "bodies": {name: asdict(found) for name, found in self._known.items()},
        }
        text = json.dumps(content, indent=1)
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, lambda path: path.write_text(text, encoding="utf-8"))


def _read(path: Path) -> dict[str, TrialResult]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        found = {name: TrialResult(**fields) for name, fields in content["bodies"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return found if all(map(_makes_sense, found.values())) else {}


def _makes_sense(result: TrialResult) -> bool:
    """A result that passes has its ratio: nothing else is believed."""
    ratio, problem = result.ratio, result.problem
    if problem is None:
        return isinstance(ratio, float | int) and not isinstance(ratio, bool) and 0 <= ratio <= 1
    return isinstance(problem, str)
