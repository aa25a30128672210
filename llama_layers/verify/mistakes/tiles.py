"""Tiles of a result or of a matrix in another place, or transposed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.near import other_weight
from llama_layers.verify.mistakes.registry import Changed, Kind, mistake, moved
from llama_layers.verify.operations import Linear, Operation
from llama_layers.verify.roundoff import Float64Array

_TILES = (4, 8, 16, 32, 64, 128)
# Numbers of a tile that are looked for elsewhere.
_LOOKED_AT = 8


@mistake(Linear, "tiles of the matrix transposed")
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Transposes each tile of {0} x {0} of the matrix; it should leave them as they are."""
    rows, columns = linear.weight.shape
    for tile in _TILES:
        if rows % tile == 0 and columns % tile == 0 and tile < max(rows, columns):
            tiles = linear.weight.reshape(rows // tile, tile, columns // tile, tile)
            changed = replace(linear, weight=tiles.swapaxes(1, 3).reshape(rows, columns))
            if other_weight(changed, at):
                yield changed, tile


@mistake(Operation, "a tile in another place", kind=Kind.SOLVED)
def _(operation: Operation, at: FailingSite) -> Changed | None:
    """Has {2} at tokens {0} and outputs {1}; it should have their own numbers."""
    # Where else among the right numbers those of the box of wrong elements are.
    wrong = (at.ratio > 1).reshape(*at.ratio.shape[:2], -1)
    if at.site.pairwise or not wrong.any():
        return None
    batch, tokens, outputs = (np.flatnonzero(wrong.any(axis=axes)) for axes in _OTHERS)
    shape = wrong.shape
    exact, theirs = (wide(y).reshape(shape) for y in (at.bound(at.formats).exact, at.computed))
    if len(batch) != 1 or wrong.sum() < 0.8 * len(tokens) * len(outputs):
        return None
    box = [(int(y[0]), int(y[-1]) + 1) for y in (tokens, outputs)]
    sizes = [stop - start for start, stop in box]
    if sizes == list(shape[1:]) or sizes[0] * sizes[1] < _LOOKED_AT:
        return None
    right, mine = exact[batch[0]], theirs[batch[0]][slice(*box[0]), slice(*box[1])]
    rows, columns = slice(*box[0]), slice(*box[1])
    found = _elsewhere(right, mine)
    transposed = sizes[0] == sizes[1] and _same(right[rows, columns].T, mine)
    if found is not None:
        there = slice(found[0], found[0] + sizes[0]), slice(found[1], found[1] + sizes[1])
        of = f"tokens {_span(found[0], sizes[0])} and outputs {_span(found[1], sizes[1])}"
        said = f"the numbers of {of}"
    elif transposed:
        there, said = (rows, columns), "the tile transposed"
    else:
        return None

    def move(y: Float64Array) -> Float64Array:
        flat = y.reshape(shape).copy()
        tile = flat[batch[0]][there].copy()
        flat[batch[0], rows, columns] = tile if found is not None else tile.T
        return flat.reshape(y.shape)

    return moved(at, move), _span(box[0][0], sizes[0]), _span(box[1][0], sizes[1]), said


_OTHERS = ((1, 2), (0, 2), (0, 1))


def _elsewhere(right: Float64Array, mine: Float64Array) -> tuple[int, int] | None:
    """Where the right numbers are those of a tile."""
    last = [a - b + 1 for a, b in zip(right.shape, mine.shape, strict=True)]
    errors = np.zeros(last)
    picked = np.random.default_rng(0).integers(0, mine.size, _LOOKED_AT)
    for row, column in zip(*np.unravel_index(picked, mine.shape), strict=True):
        part = right[row : row + last[0], column : column + last[1]]
        errors += np.square(part - mine[row, column])
    for index in np.argsort(errors, axis=None)[:4]:
        row, column = (int(i) for i in np.unravel_index(index, errors.shape))
        there = right[row : row + mine.shape[0], column : column + mine.shape[1]]
        if _same(there, mine):
            return row, column
    return None


def _same(one: Float64Array, other: Float64Array) -> bool:
    return bool(np.sum(np.square(one - other)) < 1e-4 * np.sum(np.square(other)))


def _span(start: int, size: int) -> str:
    return f"{start}..{start + size - 1}"
