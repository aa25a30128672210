"""Mistakes of ports: the name that a diagnosis should give, where it shows, and the wrong code."""

from tests.support.mistakes import (
    formulas,
    heads,
    kernels,
    mlp,
    norms,
    projections,
    quantised,
    read_off,
    rope,
    rounding,
    sinks,
    solved,
    streams,
    switches,
)
from tests.support.mistakes.mistake import Mistake

MISTAKES = [
    mistake
    for subject in (
        streams,
        rope,
        projections,
        norms,
        heads,
        kernels,
        sinks,
        mlp,
        rounding,
        quantised,
        solved,
        read_off,
        switches,
        formulas,
    )
    for mistake in subject.MISTAKES
]

__all__ = ["MISTAKES", "Mistake"]
