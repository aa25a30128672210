"""Mistakes in the residual stream: what enters it, and what is added to what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify.failing_site import FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Float64Array,
    Formula,
    Hypothesis,
    Kind,
    wide,
)
from llama_layers.verify.operations import Embedding, Residual

# Of more wrong tokens than that the ids are not looked for.
_IDS = 64


def _sum(*terms: Float64Array) -> Formula:
    magnitude: Float64Array = np.sum([np.abs(term) for term in terms], axis=0)
    total: Float64Array = np.sum(terms, axis=0)
    return Formula(total, magnitude, len(terms) + 2)


def _residual_missing(residual: Residual, failing: FailingSite) -> Iterator[Formula]:
    yield _sum(wide(residual.added))


def _block_not_added(residual: Residual, failing: FailingSite) -> Iterator[Formula]:
    yield _sum(wide(residual.x))


def _added_twice(residual: Residual, failing: FailingSite) -> Iterator[Change]:
    x, added = wide(residual.x), wide(residual.added)
    yield Change(_sum(2 * x, added), "The port seems to add the residual stream twice.")
    yield Change(_sum(x, 2 * added), "The port seems to add the block's output twice.")


def _subtracted(residual: Residual, failing: FailingSite) -> Iterator[Formula]:
    x, added = wide(residual.x), wide(residual.added)
    yield _sum(x, -added)
    yield _sum(-x, added)


def _another_stream(residual: Residual, failing: FailingSite) -> Iterator[Change]:
    for name, x in failing.streams(residual.x.shape):
        yield Change(
            replace(residual, x=x),
            f"The port seems to add what the block computes to {name}; it should be added to "
            f"{failing.site.routes[0][0]}.",
        )


def _another_block(residual: Residual, failing: FailingSite) -> Iterator[Change]:
    for name, added in failing.streams(residual.x.shape):
        yield Change(
            replace(residual, added=added),
            f"The port seems to add {name}; it should be {failing.site.routes[0][1]}.",
        )


def _one_more(residual: Residual, failing: FailingSite) -> Iterator[Change]:
    for name, more in failing.streams(residual.x.shape):
        if name not in failing.site.routes[0]:
            yield Change(
                _sum(wide(residual.x), wide(residual.added), wide(more)),
                f"The port seems to add {name}, too.",
            )


def _scaled(residual: Residual, failing: FailingSite) -> Iterator[Change]:
    """The factor of the block's output that fits best."""
    x, added, computed = wide(residual.x), wide(residual.added), wide(failing.computed)
    size = float(np.sum(np.square(added)))
    if not size or not np.isfinite(computed).all():
        return
    factor = float(np.sum((computed - x) * added)) / size
    formula = _sum(x, factor * added)
    yield Change(
        replace(formula, roundings=8),
        f"The port seems to add {factor:.6g} times what the block computes.",
    )


def _embedding_scaled(embedding: Embedding, failing: FailingSite) -> Iterator[Formula]:
    rows = wide(embedding.table[embedding.ids])
    root = math.sqrt(rows.shape[-1])
    for dtype in (np.float64, np.float32, ml_dtypes.bfloat16, np.float16):
        factor = float(np.asarray(root, dtype))
        yield Formula(rows * factor, np.abs(rows * factor), 3)


def _ids_shifted(embedding: Embedding, failing: FailingSite) -> Iterator[Change]:
    size = len(embedding.table)
    for step in (1, -1):
        ids = (embedding.ids + step) % size
        yield Change(
            replace(embedding, ids=ids),
            f"The port seems to read the row of id {step:+d} for each id.",
        )


def _tokens_shifted(embedding: Embedding, failing: FailingSite) -> Iterator[Change]:
    for step, which in ((1, "before"), (-1, "after")):
        yield Change(
            replace(embedding, ids=np.roll(embedding.ids, step, axis=1)),
            f"The port seems to read the row of the token {which} each.",
        )


def _other_ids(embedding: Embedding, failing: FailingSite) -> Iterator[Change]:
    """The row of the table that each wrong token has, where there is one."""
    bound = failing.bound(failing.formats)
    wrong = np.argwhere((bound.ratio(failing.computed) > 1).any(axis=-1))
    if not 0 < len(wrong) <= _IDS:
        return
    ids, said = embedding.ids.copy(), []
    for b, s in wrong:
        row = _row_of(wide(failing.computed[b, s]), embedding.table, failing.formats.dtype)
        if row is None:
            return
        said.append(f"({b}, {s}): the array is row {row}, input_ids says {ids[b, s]}")
        ids[b, s] = row
    more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
    yield Change(replace(embedding, ids=ids), f"Token at {'; at '.join(said[:3])}{more}.")


def _row_of(row: Float64Array, table: NDArray[Any], dtype: str) -> int | None:
    """Which row of a table it may be in a format: the nearest of those that begin like it."""
    start = row[:4]
    off = np.abs(table[:, : len(start)].astype(np.float64) - start)
    near = np.flatnonzero((off <= 2 * FLOATS[dtype].unit_roundoff * np.abs(start)).all(axis=-1))
    if not len(near):
        return None
    return int(near[np.argmin(np.abs(table[near].astype(np.float64) - row).sum(axis=-1))])


def _another_table(embedding: Embedding, failing: FailingSite) -> Iterator[Change]:
    yield Change(
        replace(embedding, table=to_numpy(failing.model.weights.lm_head)),
        "The port seems to read rows of the head; they should be the embedding's.",
    )
    rows, columns = embedding.table.shape
    yield Change(
        replace(embedding, table=embedding.table.reshape(columns, rows).T),
        "The port seems to read the embedding as if it were stored [hidden, vocabulary].",
    )


HYPOTHESES = (
    Hypothesis(
        "residual missing",
        Residual,
        _residual_missing,
        "The port seems to pass on what the block computes; the residual stream should be added.",
    ),
    Hypothesis(
        "block not added",
        Residual,
        _block_not_added,
        "The port seems to pass the residual stream on; what the block computes should be added.",
    ),
    Hypothesis("added twice", Residual, _added_twice),
    Hypothesis(
        "subtracted for added",
        Residual,
        _subtracted,
        "The port seems to subtract; it should add.",
    ),
    Hypothesis("residual from the wrong place", Residual, _another_stream),
    Hypothesis("another block added", Residual, _another_block),
    Hypothesis("one array more added", Residual, _one_more),
    Hypothesis("added block scaled", Residual, _scaled, kind=Kind.SOLVED),
    Hypothesis(
        "embedding scaled by the root of hidden_size",
        Embedding,
        _embedding_scaled,
        "The port seems to multiply the embedding with the root of hidden_size, as Gemma does; "
        "Llama does not.",
    ),
    Hypothesis("token ids shifted", Embedding, _ids_shifted),
    Hypothesis("tokens shifted", Embedding, _tokens_shifted),
    Hypothesis("other token ids", Embedding, _other_ids, kind=Kind.SOLVED),
    Hypothesis("another embedding table", Embedding, _another_table),
)
