"""An engine in a benchmark: what is timed of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama_layers.bench.job import ModelJob

Call = Callable[[], object]
State = TypeVar("State")
# Tokens drawn before those that are timed. Ours captures a graph with the second of them; torch
# warms up, captures and replays one.
WAKING = 3


@dataclass(frozen=True)
class Engine:
    """An engine that is ready for a job."""

    name: str
    numbers: str
    """The formats that it stores and computes in."""
    prepare: Callable[[int], Call]
    """``prepare(size)`` does what is not timed, and some of the same work, so that the engine's
    threads are awake; it returns the call that is timed, which returns the last result."""
    to_numpy: Callable[[Any], np.ndarray] = np.asarray
    """The numbers of that result."""


class ModelRunner(Protocol[State]):
    """An engine that runs a whole model, with its own kind of cache."""

    name: str
    numbers: str

    def start(self, length: int) -> State:
        """Make an empty cache for this number of tokens."""

    def copy(self, state: State) -> State:
        """Copy a cache, so that feeding the copy does not change it."""

    def feed(self, state: State, ids: NDArray[np.int64]) -> tuple[Any, State]:
        """Run tokens [B, S]; return the logits of the last ones, and the cache with all."""

    def to_numpy(self, logits: Any) -> np.ndarray:
        """The numbers of logits."""


class DrawingRunner(ModelRunner[State], Protocol[State]):
    """Also draws tokens, and feeds them to the model without looking at them."""

    def draw(self, state: State, ids: NDArray[np.int64], count: int) -> Call:
        """Start from the tokens [B, 1] before; each call draws the likeliest and feeds them."""


def drawing_engine(runner: DrawingRunner[State], job: ModelJob) -> Engine:
    """Make an engine that decodes by itself, from the same cache each time.

    Its result stands for the logits that the first token is drawn from.
    """

    @cache
    def filled(size: int) -> State:
        """All but the last of the tokens before, and room for those that come."""
        state = runner.start(size + WAKING + job.steps + 1)
        return runner.feed(state, job.ids[:, : size - 1])[1] if size > 1 else state

    def prepare(size: int) -> Call:
        step = runner.draw(
            runner.copy(filled(size)), job.ids[:, size - 1 : size], WAKING + job.steps
        )
        for _ in range(WAKING):
            step()

        def call() -> int:
            for _ in range(job.steps):
                step()
            return size

        return call

    def to_numpy(size: int) -> np.ndarray:
        last = job.ids[:, size - 1 : size]
        return runner.to_numpy(runner.feed(runner.copy(filled(size)), last)[0])

    return Engine(runner.name, runner.numbers, prepare, to_numpy)


def model_engine(runner: ModelRunner[State], job: ModelJob) -> Engine:
    """Make an engine that feeds a model the tokens of the job, from the same cache each time."""

    @cache
    def filled(size: int) -> State:
        """All but the last token of those before."""
        before, parts = job.passes(size)
        state = runner.start(before + sum(parts))
        return runner.feed(state, job.ids[:, : before - 1])[1] if before > 1 else state

    def prepare(size: int) -> Call:
        before, parts = job.passes(size)
        start = runner.copy(filled(size))
        if before:
            start = runner.feed(start, job.ids[:, before - 1 : before])[1]
        ends = np.cumsum([before, *parts])
        pieces = [job.ids[:, a:b] for a, b in pairwise(ends)]

        def call() -> object:
            state = start
            for piece in pieces:
                logits, state = runner.feed(state, piece)
            return logits

        return call

    return Engine(runner.name, runner.numbers, prepare, runner.to_numpy)
