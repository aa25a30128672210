"""Mistakes in the residual stream: what enters it, and what is added to what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.families import module_name
from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.registry import Changed, Kind, by_token, evaluated, mistake
from llama_layers.verify.operations import Embedding, Norm, Residual, Rows
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked, read

# Where more tokens than that are wrong, their ids are not looked for.
_IDS = 64


@mistake(Residual, "residual missing")
def _(r: Residual[Tracked]) -> Tracked:
    """Passes on what the block computes; it should add it to the residual stream."""
    return r.added


@mistake(Residual, "block not added", common=1)
def _(r: Residual[Tracked]) -> Tracked:
    """Passes the residual stream on; it should add what the block computes."""
    return r.x


@mistake(Residual, "added twice")
def _(r: Residual[Tracked]) -> Tracked:
    """Adds the residual stream twice; it should add it once."""
    return 2 * r.x + r.added


@mistake(Residual, "added twice")
def _(r: Residual[Tracked]) -> Tracked:
    """Adds the block's output twice; it should add it once."""
    return r.x + 2 * r.added


@mistake(Residual, "subtracted for added")
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    """Subtracts what it should add."""
    yield by_token(residual, lambda r: r.x - r.added)
    yield by_token(residual, lambda r: r.added - r.x)


@mistake(Residual, "residual from the wrong place")
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    """Adds what the block computes to {0}; it should add it to {1}."""
    for name, x in at.streams(residual.x.shape):
        yield replace(residual, x=x), name, at.site.routes[0][0]


def _before_norm(at: FailingSite) -> str:
    """What is normalised before it is added; nothing if what is added is not."""
    added = at.input_site(1)
    return added.routes[0][0] if added is not None and added.operation == "norm" else ""


@mistake(Residual, "norm skipped")
def _(residual: Residual, at: FailingSite) -> Changed | None:
    """Adds {0} as it is; it should normalise it first, which gives {1}."""
    if not (name := _before_norm(at)) or (added := at.array(name)) is None:
        return None
    return replace(residual, added=added.reshape(residual.x.shape)), name, at.site.routes[0][1]


@mistake(Residual, "another block added")
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    """Adds {0}; it should add {1}."""
    for name, added in at.streams(residual.x.shape):
        if name != _before_norm(at):
            yield replace(residual, added=added), name, at.site.routes[0][1]


@mistake(Residual, "one array more added")
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    """Adds {0}, too."""
    for name, more in at.streams(residual.x.shape):
        if name not in at.site.routes[0]:
            wrong = evaluated(residual, lambda r, y: r.x + r.added + read("y", y, r.x.how), more)
            yield wrong, name


@mistake(Residual, "what is added normalised")
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    """Normalises what the block computes before it adds it, {0}; it should add it as it is."""
    for weight, said in norms_of_layer(at):
        yield (
            by_token(residual, lambda r, w: r.x + normed(r.added, w, at), weight),
            said,
        )


@mistake(Residual, "sum normalised")
def _(residual: Residual, at: FailingSite) -> Iterator[Changed]:
    """Normalises the sum, {0}; it should pass it on as it is."""
    for weight, said in norms_of_layer(at):
        yield by_token(residual, lambda r, w: normed(r.x + r.added, w, at), weight), said


def norms_of_layer(at: FailingSite) -> Iterator[tuple[np.ndarray, str]]:
    """The weights of the layer's norms, and one that scales nothing."""
    assert at.site.layer is not None  # a residual is inside a layer
    layer = at.model.weights.layers[at.site.layer]
    for role, weight in layer.norms().items():
        name = module_name(at.config.model_type, role)
        yield to_numpy(weight), f"with the weight of {name}"
    yield np.ones(at.config.hidden_size) - at.config.norm_weight_offset, "without a weight"


def normed(x: Tracked, weight: np.ndarray, at: FailingSite) -> Tracked:
    """The RMSNorm of tracked numbers, with a weight of the model's."""
    scale = read("weight", weight, x.how, recorded=False)
    if at.config.norm_weight_offset:
        scale = scale + at.config.norm_weight_offset
    return Norm.formula(Norm(x, scale, at.config.rms_norm_eps))


def right_factor(residual: Residual) -> str:
    """What should be added, in words."""
    times = residual.multiplier
    return "it as it is" if times == 1 else f"{times:g} times that"


@mistake(Residual, "added block scaled", kind=Kind.SOLVED)
def _(residual: Residual, at: FailingSite) -> Changed | None:
    """Adds {0:.6g} times what the block computes; it should add {1}."""
    # The factor of the block's output that fits best.
    x, added, computed = wide(residual.x), wide(residual.added), wide(at.computed)
    size = float(np.sum(np.square(added)))
    if not size or not np.isfinite(computed).all():
        return None
    factor = float(np.sum((computed - x) * added)) / size
    # The fit may miss a factor of few digits by roundings of its own.
    with np.errstate(over="ignore"):
        single = float(np.float32(factor))
    for near in (single, float(f"{factor:.12g}")):
        if np.isclose(near, factor, rtol=1e-13, atol=0):
            factor = near
    return replace(residual, multiplier=factor), factor, right_factor(residual)


@mistake(Embedding, "embedding scaled by the root of hidden_size", common=1)
def _(embedding: Embedding, at: FailingSite) -> Iterator[Changed]:
    """Multiplies the embedding by the root of hidden_size, as Gemma does; it should take it as
    it is."""
    if embedding.factor != 1:
        return
    root = math.sqrt(embedding.table.shape[1])
    for dtype in (np.float64, np.float32, ml_dtypes.bfloat16, np.float16):
        yield evaluated(embedding, lambda e, by: e.rows * by, float(np.asarray(root, dtype)))


@mistake(Embedding, "token ids shifted")
def _(embedding: Embedding, at: FailingSite) -> Iterator[Changed]:
    """Reads the row of id {0:+d} for each id."""
    for step in (1, -1):
        yield replace(embedding, ids=(embedding.ids + step) % len(embedding.table)), step


@mistake(Embedding, "tokens shifted")
def _(embedding: Embedding, at: FailingSite) -> Iterator[Changed]:
    """Reads the row of the token {0} each; it should read its own."""
    yield replace(embedding, ids=np.roll(embedding.ids, 1, axis=1)), "before"
    yield replace(embedding, ids=np.roll(embedding.ids, -1, axis=1)), "after"


@mistake(Embedding, "other token ids", kind=Kind.SOLVED)
def _(embedding: Embedding, at: FailingSite) -> Changed | None:
    """The token at {0}."""
    # The row of the table that each wrong token has, where there is one.
    bound = at.bound(at.formats)
    table = embedding.table if embedding.factor == 1 else wide(embedding.table) * embedding.factor
    wrong = np.argwhere((bound.ratio(at.computed) > 1).any(axis=-1))
    if not 0 < len(wrong) <= _IDS:
        return None
    ids, said = embedding.ids.copy(), []
    for b, s in wrong:
        row = _row_of(wide(at.computed[b, s]), table, at.formats.dtype)
        if row is None:
            return None
        said.append(f"({b}, {s}): the array is row {row}, input_ids says {ids[b, s]}")
        ids[b, s] = row
    more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
    return (replace(embedding, ids=ids), f"{'; at '.join(said[:3])}{more}")


def _row_of(row: Float64Array, table: np.ndarray, dtype: str) -> int | None:
    """The row of a table that it may be in a format: the nearest of those that begin like it."""
    start = row[:4]
    off = np.abs(table[:, : len(start)].astype(np.float64) - start)
    near = np.flatnonzero((off <= 2 * FLOATS[dtype].unit_roundoff * np.abs(start)).all(axis=-1))
    if not len(near):
        return None
    return int(near[np.argmin(np.abs(table[near].astype(np.float64) - row).sum(axis=-1))])


@mistake(Embedding, "another row added", kind=Kind.SOLVED)
def _(embedding: Embedding, at: FailingSite) -> Changed | None:
    """Adds row {0} of the table to those of {1} tokens, as a share of the vocabulary does that
    hides nothing of the other shares; it should add nothing."""
    wrong = np.asarray((at.ratio > 1).any(axis=-1))
    error = (wide(at.computed) - at.bound(at.formats).exact)[wrong]
    if len(error) < 2 or not np.isfinite(error).all():
        return None
    table = wide(embedding.table) * embedding.factor
    size = np.maximum(np.linalg.norm(table, axis=-1), 1e-300)
    row = int(np.argmax(table @ error.mean(axis=0) / size))
    if np.sum(np.square(error - table[row])) > 0.1 * np.sum(np.square(error)):
        return None
    places = wrong[..., None]

    def formula(e: Rows) -> Tracked:
        more = read("row", embedding.table[row], e.rows.how, recorded=False) * embedding.factor
        return e.rows.where(~places, (e.rows + more).to(e.rows.how.out))

    return evaluated(embedding, formula), row, len(error)


@mistake(Embedding, "another embedding table")
def _(embedding: Embedding, at: FailingSite) -> Embedding:
    """Reads rows of the head; it should read those of the embedding."""
    return replace(embedding, table=to_numpy(at.model.weights.lm_head))


@mistake(Embedding, "another embedding table")
def _(embedding: Embedding, at: FailingSite) -> Embedding:
    """Reads the embedding as if it were stored [hidden, vocabulary]; it should read it as
    [vocabulary, hidden]."""
    rows, columns = embedding.table.shape
    return replace(embedding, table=embedding.table.reshape(columns, rows).T)
