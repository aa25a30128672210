"""What takes part in a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama_layers.bench.job import ModelJob

Call = Callable[[], Any]
State = TypeVar("State")


@dataclass(frozen=True)
class Contestant:
    """One that computes a job.

    Attributes
    ----------
    name : str
        Of the engine.
    numbers : str
        The formats that it stores and computes in.
    prepare : callable
        ``prepare(size)`` does what is not timed, and some of the same work, so that the engine's
        threads are awake; it returns the call that is timed, which returns the last result.
    to_numpy : callable
        The numbers of that result.
    """

    name: str
    numbers: str
    prepare: Callable[[int], Call]
    to_numpy: Callable[[Any], NDArray[Any]] = np.asarray


class Engine(Protocol[State]):
    """One that runs a whole model."""

    name: str
    numbers: str

    def start(self, length: int) -> State:
        """An empty cache for so many tokens."""

    def copy(self, state: State) -> State:
        """A cache that can be fed without a change to this one."""

    def feed(self, state: State, ids: NDArray[np.int64]) -> tuple[Any, State]:
        """Run tokens [1, S]; the logits of the last one, and the cache with all of them."""

    def to_numpy(self, logits: Any) -> NDArray[Any]:
        """The numbers of logits."""


def model_contestant(engine: Engine[State], job: ModelJob) -> Contestant:
    """An engine that feeds a model what the job says, from the same cache each time."""

    @cache
    def filled(size: int) -> State:
        """All but the last token of those before."""
        before, parts = job.passes(size)
        state = engine.start(before + sum(parts))
        return engine.feed(state, job.ids[:, : before - 1])[1] if before > 1 else state

    def prepare(size: int) -> Call:
        before, parts = job.passes(size)
        start = engine.copy(filled(size))
        if before:
            start = engine.feed(start, job.ids[:, before - 1 : before])[1]
        ends = np.cumsum([before, *parts])
        pieces = [job.ids[:, a:b] for a, b in pairwise(ends)]

        def call() -> Any:
            state = start
            for piece in pieces:
                logits, state = engine.feed(state, piece)
            return logits

        return call

    return Contestant(engine.name, engine.numbers, prepare, engine.to_numpy)
