"""Results of trials of bodies on this machine, kept in the cache directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llama_layers.backends import machine
from llama_layers.files.output import cache_directory, using_cache, write_atomically
from llama_layers.files.progress import announce


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
    process tries the bodies again, and says why.
    """

    def __init__(self, library: str) -> None:
        self._facts = machine.describe(library)
        key = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:24]
        self._file = f"{library}-{key}.json"
        self._known = self._stored()

    def get(self, body: str) -> TrialResult | None:
        """The result of a body's trial, if it is known."""
        return self._known.get(body)

    def put(self, body: str, result: TrialResult) -> None:
        """Remember it, beside what other processes may have found since."""
        self._known = self._stored() | self._known | {body: result}
        content = {
            "machine": self._facts,
            "bodies": {name: asdict(found) for name, found in self._known.items()},
        }
        text = json.dumps(content, indent=1)
        try:
            with using_cache():
                directory = cache_directory() / "bodies"
                directory.mkdir(parents=True, exist_ok=True)
                write_atomically(
                    directory / self._file, lambda path: path.write_text(text, encoding="utf-8")
                )
        except OSError as error:
            _say_once(f"each process tries faster code again, since results are not kept: {error}")

    def _stored(self) -> dict[str, TrialResult]:
        try:
            return _read(cache_directory() / "bodies" / self._file)
        except OSError:  # there is no home directory
            return {}


_say_once = cache(announce)


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
