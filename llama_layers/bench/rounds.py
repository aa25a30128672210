"""Contestants that take turns, so that a change of the machine's speed falls on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llama_layers.bench.contestants.contestant import Contestant

T = TypeVar("T")


def run_rounds(
    contestants: Sequence[Contestant],
    sizes: Sequence[int],
    *,
    rounds: int,
    timed: Callable[[Callable[[], Any]], float],
    rest: Callable[[], None],
    between: Callable[[], None],
) -> dict[int, dict[str, list[float]]]:
    """Time every contestant once in each round, at each size.

    Parameters
    ----------
    contestants : sequence of Contestant
        Who goes first changes from round to round.
    sizes : sequence of int
        The cases; each round has all of them.
    rounds : int
        How many.
    timed : callable
        Runs a call, and gives the seconds that it took.
    rest : callable
        Called before each turn: threads of the one before, which spin for a while when their
        work is done, are to be asleep.
    between : callable
        Called before each round.

    Returns
    -------
    dict of int to dict of str to list of float
        Seconds of each call, by size and name, in the order of the rounds.
    """
    found: dict[int, dict[str, list[float]]] = {
        size: {contestant.name: [] for contestant in contestants} for size in sizes
    }
    for number in range(rounds):
        between()
        for size in sizes:
            for contestant in rotated(contestants, number):
                rest()
                call = contestant.prepare(size)
                found[size][contestant.name].append(timed(call))
    return found


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items from another one on, around the end."""
    first = by % len(items)
    return [*items[first:], *items[:first]]
