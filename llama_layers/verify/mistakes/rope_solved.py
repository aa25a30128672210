"""Positions and frequencies of RoPE, read off the port's own array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.layers.rope import attention_factor, inv_freq
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.registry import Changed, Kind, mistake
from llama_layers.verify.mistakes.rope import by_phases
from llama_layers.verify.operations import Rope
from llama_layers.verify.roundoff import Float64Array

# Rows of positions that frequencies are first looked for in; the finest grid that is affordable.
_COARSE = 64
# Positions from 0 on that a token is looked for at, and how far from each that the trace states.
_FIRST, _BESIDE = 4096, 8
# How far apart the positions may lie that frequencies are first looked for in.
_SPAN = 1024
# Standard errors within which a frequency is the stated one.
_SURE = 6.0


def _rotations(rope: Rope, at: FailingSite) -> NDArray[np.complex128]:
    """For each token and pair, [B, S, R / 2]: the phase it was rotated by, as weighty as it is.

    A pair as a complex number is multiplied with exp(i phase): the conjugate of what it was times
    what it is now has that phase, and all heads share it.
    """
    arrays = (wide(y)[..., : rope.config.rotary_dim] for y in (rope.x, at.computed))
    (a, b), (c, d) = (np.split(y, 2, axis=-1) for y in arrays)
    return np.sum((a - 1j * b) * (c + 1j * d), axis=2)


@mistake(Rope, "RoPE at other positions", kind=Kind.SOLVED)
def _(rope: Rope, at: FailingSite) -> Changed | None:
    """Rotates {0}."""
    rotations = _rotations(rope, at)
    if not np.isfinite(rotations).all():
        return None
    stated = np.broadcast_to(rope.positions, rotations.shape[:2])
    places = _candidates(stated)
    omega = inv_freq(rope.config, length=int(stated.max()) + 1)
    phases = places[:, None] * omega
    # How well each position fits: the projection of the rotations on the direction it stands for.
    fit = rotations.real @ np.cos(phases).T + rotations.imag @ np.sin(phases).T
    best = places[fit.argmax(axis=-1)]
    index = np.searchsorted(places, stated)
    at_stated = np.take_along_axis(fit, index[..., None], axis=-1)[..., 0]
    found = np.where(at_stated >= fit.max(axis=-1) * (1 - 1e-9), stated, best)
    if (found == stated).all():
        return None
    said = _mapping(found, stated)
    if not at.recorded.positions_given and np.unique(found - stated).size == 1:
        said += "; if that is meant, the trace should have positions"
    return replace(rope, positions=found), said


def _candidates(stated: np.ndarray) -> NDArray[np.int64]:
    """Positions that a token may stand at: the first ones, and those around the stated ones.

    Their number does not grow with the positions.
    """
    last = max(2 * stated.shape[1], _FIRST)
    near = np.unique(stated)[:, None] + np.arange(-_BESIDE, _BESIDE + 1)
    return np.union1d(np.arange(last + 1), near[near >= 0])


def _mapping(found: np.ndarray, stated: np.ndarray) -> str:
    """Name the tokens and the positions that they use, as runs in which both go up by one."""
    parts: list[str] = []
    for row in range(found.shape[0]):
        runs: list[list[int]] = []
        for token in np.flatnonzero(found[row] != stated[row]):
            steps = runs and token == runs[-1][1] + 1
            if steps and found[row, token] == found[row, token - 1] + 1:
                runs[-1][1] = int(token)
            else:
                runs.append([int(token), int(token)])
        said = [
            f"{_span('token', a, b)} at {_span('position', found[row, a], found[row, b])}"
            f" instead of {_span('position', stated[row, a], stated[row, b])}"
            for a, b in runs
        ]
        if said and said[0] not in " ".join(parts):
            more = f" and {len(said) - 3} runs more" if len(said) > 3 else ""
            parts.append(", ".join(said[:3]) + more)
    return "; ".join(parts[:2])


def _span(noun: str, first: int, last: int) -> str:
    return f"{noun} {first}" if first == last else f"{noun}s {first}..{last}"


@mistake(Rope, "RoPE with other frequencies", kind=Kind.SOLVED)
def _(rope: Rope, at: FailingSite) -> Changed | None:
    """Rotates {0} of {1} pairs by other angles a position ({2}){3}; it should take rope_theta
    and rope_scaling from the config."""
    rotations = _rotations(rope, at)
    positions = np.broadcast_to(rope.positions, rotations.shape[:2]).ravel().astype(np.float64)
    rotations = rotations.reshape(len(positions), -1)
    early = positions[positions <= positions.min() + _SPAN]
    if not np.isfinite(rotations).all() or np.unique(early).size < 4:
        return None
    found = _frequencies(positions, rotations)
    stated = inv_freq(rope.config, length=int(positions.max()) + 1)
    unsure = _unsure(positions, rotations, found)
    found = np.where(np.abs(found - stated) <= _SURE * unsure, stated, found)
    arrays = (wide(y)[..., : rope.config.rotary_dim] for y in (at.computed, rope.x))
    theirs, given = arrays
    if rope.temperature is not None:
        theirs = theirs / rope.temperature[..., None, None]
    factor = float(np.sqrt(np.sum(np.square(theirs)) / np.sum(np.square(given))))
    shape = (*np.broadcast_shapes(np.shape(rope.positions), (1, 1)), 1, 1)
    phases = np.reshape(rope.positions, shape) * found
    different = np.flatnonzero(np.abs(found - stated) > 1e-4 * np.abs(stated))
    if not different.size:
        return None
    first = ", ".join(f"pair {i} by {found[i]:.6g}, not {stated[i]:.6g}" for i in different[:3])
    scaled = attention_factor(rope.config)
    beside = "" if abs(factor - scaled) < 1e-4 else f", and multiplies with {factor:.6g}"
    off = np.abs(np.reshape(rope.positions, shape)) * np.where(found == stated, 0.0, 3 * unsure)
    operation = by_phases(rope, phases, scaled if not beside else factor, off)
    return operation, len(different), len(found), first, beside


def _unsure(
    positions: Float64Array, rotations: NDArray[np.complex128], omega: Float64Array
) -> Float64Array:
    """The standard error of each pair's angle, from how far the phases are from it."""
    p, w = positions[:, None], np.abs(rotations)
    off = np.angle(rotations * np.exp(-1j * p * omega))
    spread = np.sum(w * off * off, axis=0) / np.maximum(np.sum(w, axis=0), 1e-300)
    size = np.sum(w * p * p, axis=0) / np.maximum(w.max(axis=0), 1e-300)
    return np.asarray(np.sqrt(spread / np.maximum(size, 1e-300)))


def _frequencies(positions: Float64Array, rotations: NDArray[np.complex128]) -> Float64Array:
    """The angle a position of each pair: the best of a grid, refined on ever later positions."""
    order = np.argsort(positions, kind="stable")[:_COARSE]
    order = order[positions[order] - positions[order][0] <= _SPAN]
    few, theirs = positions[order] - positions[order][0], rotations[order]
    theirs = theirs * np.conj(theirs[0] / max(float(np.abs(theirs[0]).max()), 1e-300))
    span = max(float(few.max()), 1.0)
    grid = np.linspace(-np.pi, np.pi, int(16 * span) + 1)
    found = grid[np.argmax((np.exp(-1j * np.outer(grid, few)) @ theirs).real, axis=0)]
    reach = span
    while True:
        near = positions <= positions.min() + reach
        p, w = positions[near][:, None], np.abs(rotations[near])
        for _ in range(3):
            off = np.angle(rotations[near] * np.exp(-1j * p * found))
            found = found + np.sum(w * p * off, axis=0) / np.maximum(
                np.sum(w * p * p, axis=0), 1e-300
            )
        if near.all():
            return np.asarray(found)
        reach *= 2
