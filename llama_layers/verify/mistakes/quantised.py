"""Weights, inputs and caches in few bits: each is rounded as engines do, and has to fit exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.across_heads import joined
from llama_layers.verify.mistakes.attention_arrays import capped, sinks_of, softmax
from llama_layers.verify.mistakes.codes import (
    FLOAT8,
    INT4,
    INT8,
    MICROSCALED,
    WITHOUT,
    Choice,
    Scaling,
    choices,
    pruned,
)
from llama_layers.verify.mistakes.near import explains_outputs, other_inputs, worst_of_product
from llama_layers.verify.mistakes.registry import Changed, Computed, Kind, evaluated, mistake
from llama_layers.verify.operations import Attention, Embedding, Linear, Product
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.rules import BLOCK_ROWS, dot, matmul
from llama_layers.verify.tracked import Tracked

_BLOCKS = (16, 32, 64, 128, 256)
_ROWS = (
    Scaling("for each row", (-1,)),
    *(Scaling(f"for each {n} inputs of a row", (-1,), blocks=n) for n in _BLOCKS),
    Scaling("for the whole matrix", (0, 1)),
    Scaling("for each column", (0,)),
    *(Scaling(f"for each tile of {n} x {n}", (1, 3), blocks=n, rows=n) for n in (32, 64, 128)),
)
_INPUTS = (
    Scaling("for each token", (-1,)),
    *(Scaling(f"for each {n} channels of a token", (-1,), blocks=n) for n in _BLOCKS),
    Scaling("for all tokens", (0, 1, 2)),
)
_CACHED = (
    Scaling("for each head of each token", (-1,)),
    Scaling("for each token", (-1, -2)),
    Scaling("for each head", (0, 1, 3)),
    Scaling("for each head of each sequence", (1, 3)),
    Scaling("for each channel", (0, 1)),
    Scaling("for each channel of each sequence", (1,)),
    Scaling("for all of it", (0, 1, 2, 3)),
    *(Scaling(f"for each {n} channels", (-1,), blocks=n) for n in (16, 32, 64)),
)
_CODES = (*INT8, *FLOAT8, *INT4, *MICROSCALED)
# What is left of the error in the worst tokens and outputs, squared, at most.
_LEFT = 0.25
# How near to a tie a code is not sure, and outputs that are looked at.
TIE, _OUTPUTS = 1e-6, 8
# Tokens in which pruned weights are looked for.
_TOKENS = 64
# Ways to round a cache that one head cannot tell apart, and that are held against all.
_ALIKE = 6


@dataclass(frozen=True)
class _Rounded:
    """Inputs or weights, as they are or in few bits."""

    array: np.ndarray
    choice: Choice | None

    def whole(self) -> tuple[Float64Array, Float64Array]:
        """All numbers, and how far off those that are near to a tie can be."""
        array, choice = wide(self.array), self.choice
        if choice is None:
            return array, np.zeros(())
        limits = None if choice.scaling is WITHOUT else choice.scaling.limits(array)
        limits = limits or (array, array)
        exact = choice.of(array, limits)
        ends = [choice.of(array * (1 + e), limits) for e in (-TIE, TIE)]
        return exact, np.maximum(*(np.abs(end - exact) for end in ends))


Limits = tuple[Float64Array, Float64Array]


def _rows(
    weight: np.ndarray,
    outputs: NDArray[np.intp],
    choice: Choice | None,
    known: dict[Scaling, Limits],
) -> Float64Array:
    """Some rows of a matrix in few bits; `known` are limits of the whole."""
    rows = wide(weight[outputs])
    if choice is None or choice.scaling.axes in ((), (-1,)):
        return rows if choice is None else choice.of(rows)
    if choice.scaling not in known:
        known[choice.scaling] = choice.scaling.limits(weight)
    scaling, limits = choice.scaling.of_rows(known[choice.scaling], outputs)
    return replace(choice, scaling=scaling).of(rows, limits)


def _some_tokens(x: np.ndarray, tokens: NDArray[np.intp], choice: Choice | None) -> Float64Array:
    """Some tokens in few bits."""
    some = wide(x[:, tokens])
    if choice is None or choice.scaling.axes in ((), (-1,)):
        return some if choice is None else choice.of(some)
    return choice.of(some, choice.scaling.limits(x))


Choices = list[Choice | None]


def _best(
    linear: Linear, at: FailingSite, inputs: Choices, weights: Choices
) -> tuple[Choice | None, Choice | None] | None:
    """What explains the worst of a product best, if anything does."""
    if not (at.ratio > 1).any():
        return inputs[0], weights[0]
    tokens, outputs = worst_of_product(at, _OUTPUTS)
    places = np.ix_(np.arange(len(linear.x)), tokens, outputs)
    bias = 0.0 if linear.bias is None else wide(linear.bias[outputs])
    wrong = (at.ratio[places] > 1).any(axis=-1)
    theirs = (wide(at.computed[places]) - bias)[wrong]
    right = (at.bound(at.formats).exact[places] - bias)[wrong]
    known: dict[Scaling, Limits] = {}

    def best(xs: Choices, ws: Choices) -> tuple[Choice | None, Choice | None, float]:
        every = [_rows(linear.weight, outputs, w, known) for w in ws]
        rows = np.concatenate(every).astype(np.float32)
        errors = np.empty((len(xs), len(ws)))
        for i, each in enumerate(xs):
            some = _some_tokens(linear.x, tokens, each)[wrong].astype(np.float32)
            y = (some @ rows.T).reshape(len(theirs), len(ws), -1)
            errors[i] = np.sum(np.square(y - theirs[:, None]), axis=(0, 2))
        errors[np.isnan(errors)] = np.inf
        least = int(np.argmin(errors))
        return xs[least // len(ws)], ws[least % len(ws)], float(errors.flat[least])

    most = _LEFT * np.sum(np.square(right - theirs))
    *found, left = best(inputs, weights)
    if not left < 2 * most:
        return None
    x, w, left = best(*map(_with_other_scales, found))
    return (x, w) if left < most else None


def _with_other_scales(choice: Choice | None) -> Choices:
    return [None] if choice is None else [*choice.others()]


def _product(linear: Linear, inputs: Choice | None, weights: Choice | None) -> Computed:
    """The product of rounded numbers."""
    return product_of(
        linear,
        None if inputs is None else _Rounded(linear.x, inputs).whole(),
        None if weights is None else _Rounded(linear.weight, weights).whole(),
    )


def product_of(linear: Linear, inputs: Limits | None, weights: Limits | None) -> Computed:
    """The product of numbers that may be off: numbers, and by how much they may be."""
    matrix, unsure = weights or (np.zeros((0, 0)), np.zeros(()))
    bias = None if linear.bias is None else wide(linear.bias)

    def formula(n: Product) -> Tracked:
        x = n.x if inputs is None else n.x.with_errors((inputs[1],) * 2, inputs[0])
        if weights is None:
            return matmul(x, linear.weight, linear.bias)
        parts = []
        for start in range(0, len(matrix), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            some = Tracked(matrix[block], unsure[block], unsure[block], x.how, x.how.sums)
            parts.append(dot(x, some, None if bias is None else bias[block]))
        return joined(parts, -1)

    return evaluated(linear, formula)


def _of_weights(linear: Linear) -> Choices:
    return [*choices(_CODES, _ROWS, linear.weight.shape)]


def _of_inputs(linear: Linear) -> Choices:
    return [*choices((*INT8, *FLOAT8, *MICROSCALED), _INPUTS, linear.x.shape)]


def _said(choice: Choice | None) -> str:
    return "" if choice is None else choice.said


@mistake(Linear, "weights quantised", kind=Kind.ROUNDING)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Multiplies by weights in {0}; it should multiply by those of the checkpoint."""
    found = _best(linear, at, [None], _of_weights(linear))
    return None if found is None else (_product(linear, *found), _said(found[1]))


@mistake(Linear, "inputs quantised", kind=Kind.ROUNDING)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Multiplies inputs in {0}; it should multiply them as they are."""
    found = _best(linear, at, _of_inputs(linear), [None])
    return None if found is None else (_product(linear, *found), _said(found[0]))


@mistake(Linear, "weights and inputs quantised", kind=Kind.ROUNDING)
def _(linear: Linear, at: FailingSite) -> Changed | None:
    """Multiplies inputs in {0}, by weights in {1}; it should multiply them as they are."""
    found = _best(linear, at, _of_inputs(linear), _of_weights(linear))
    if found is None:
        return None
    return _product(linear, *found), _said(found[0]), _said(found[1])


@mistake(Linear, "weights pruned", kind=Kind.ROUNDING)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Has zeros for the smallest {0} of {1} weights in a row; it should keep all."""
    _, outputs = worst_of_product(at)
    bias = None if linear.bias is None else linear.bias[outputs]
    for keep, of in ((2, 4), (1, 2), (4, 8)):
        for last in (False, True) if linear.weight.shape[1] % of == 0 else ():
            few = pruned(linear.weight[outputs], keep, of, last)
            if explains_outputs(replace(linear, weight=few, bias=bias), at, outputs):
                yield replace(linear, weight=pruned(linear.weight, keep, of, last)), of - keep, of


@mistake(Linear, "weights pruned", kind=Kind.SOLVED)
def _(linear: Linear, at: FailingSite) -> Iterator[Changed]:
    """Has zeros for {0}; it should keep all."""
    # How many of the smallest are gone, from the worst outputs: as many in each, or up to a number.
    _, outputs = worst_of_product(at)
    x = wide(linear.x).reshape(-1, linear.x.shape[-1])[:_TOKENS]
    error = wide(at.computed) - at.bound(at.formats).exact
    error = error.reshape(-1, error.shape[-1])[:_TOKENS]
    counts, limits = [], []
    for output in outputs:
        row = wide(linear.weight[output])
        order = np.argsort(np.abs(row), kind="stable")
        gone = np.cumsum(x[:, order] * row[order], axis=1)
        left = np.sum(np.square(error[:, output, None] + gone), axis=0)
        if left.min() > _LEFT * np.sum(np.square(error[:, output])):
            return
        counts.append(int(np.argmin(left)) + 1)
        size = np.append(np.abs(row)[order], np.inf)
        limits.append((size[counts[-1] - 1], size[counts[-1]]))
    size, width = np.abs(wide(linear.weight)), linear.weight.shape[1]
    least, most = max(low for low, _ in limits), min(high for _, high in limits)
    if len(set(counts)) == 1:
        ranks = np.argsort(np.argsort(size, axis=-1, kind="stable"), axis=-1)
        weight = np.where(ranks < counts[0], 0, linear.weight)
        yield replace(linear, weight=weight), f"the smallest {counts[0]} of {width} in each row"
    if least < most:
        weight = np.where(size <= least, 0, linear.weight)
        yield replace(linear, weight=weight), f"weights of {least:.3g} or less in magnitude"


@mistake(Embedding, "embedding quantised", kind=Kind.ROUNDING)
def _(embedding: Embedding, at: FailingSite) -> Iterator[Changed]:
    """Has rows of the embedding in {0}; it should have those of the checkpoint."""
    # Rows of the tokens alone, which are all that scales for rows depend on.
    rows = embedding.table[embedding.ids]
    ids = np.arange(rows.shape[0] * rows.shape[1]).reshape(rows.shape[:2])
    table, theirs = rows.reshape(-1, rows.shape[-1]), wide(at.computed)
    right = np.sum(np.square(theirs - wide(rows))) or np.inf
    local = tuple(scaling for scaling in _ROWS if scaling.axes == (-1,))
    for choice in choices(_CODES, local, table.shape):
        if _left(choice, table, theirs) <= 2 * _LEFT * right:
            best = min(choice.others(), key=lambda each: _left(each, table, theirs))
            found = best.of(table)
            yield replace(embedding, ids=ids, table=found.astype(np.float32)), best.said


def _left(choice: Choice, table: np.ndarray, theirs: Float64Array) -> float:
    return float(np.sum(np.square(choice.of(table).reshape(theirs.shape) - theirs)))


@mistake(Attention, "cache quantised", kind=Kind.ROUNDING)
def _(attention: Attention, at: FailingSite) -> Iterator[Changed]:
    """Has {0} in {1}; it should keep them as they are, or say so."""
    # Looked for in the worst head of the worst query, and held against all.
    head = _OneHead(attention, at)
    found = {
        (fields, choice): error
        for choice in choices((*INT8, *FLOAT8, *INT4), _CACHED, attention.k.shape)
        for fields, error in head.left(choice)
    }
    least = min(found.values())
    if least > 2 * _LEFT * head.right:
        return
    words = {"kv": "keys and values", "k": "keys", "v": "values"}
    alike = [key for key, error in found.items() if error <= 4 * least + head.tiny]
    for fields, choice in alike[:_ALIKE]:
        for each in choice.others():
            arrays = {name: each.of(getattr(attention, name)) for name in fields}
            if changed := other_inputs(attention, at, **arrays):
                yield changed, words[fields], each.said


class _OneHead:
    """The worst query of the worst head, with its cache in few bits."""

    def __init__(self, attention: Attention, at: FailingSite) -> None:
        last = at.ratio.size - 1 - int(np.argmax(at.ratio.ravel()[::-1]))
        worst = np.unravel_index(last, at.ratio.shape)
        self.batch, token, head = (int(i) for i in worst[:3])
        self.k, self.v = attention.k, attention.v
        self.kv = head * self.k.shape[2] // attention.q.shape[2]
        self.q = wide(attention.q[self.batch, token, head]) * attention.scale
        self.cap, self.sink = attention.cap, float(sinks_of(attention)[head, 0, 0])
        shape = (len(attention.q), attention.q.shape[1], self.k.shape[1])
        self.seen = np.broadcast_to(np.asarray(attention.mask), shape)[self.batch, token]
        self.theirs = wide(at.computed[self.batch, token, head])
        self.tiny = 1e-12 * float(np.sum(np.square(self.theirs)))
        exact = at.bound(at.formats).exact[self.batch, token, head]
        self.right = float(np.sum(np.square(exact - self.theirs))) or np.inf

    def left(self, choice: Choice) -> Iterator[tuple[str, float]]:
        """The error that is left where both, keys or values are in few bits."""
        k, v = (wide(y[self.batch, :, self.kv]) for y in (self.k, self.v))
        few_k, few_v = (self._of(choice, y) for y in (self.k, self.v))
        for fields, keys, values in (("kv", few_k, few_v), ("k", few_k, v), ("v", k, few_v)):
            scores = capped(keys @ self.q, self.cap)
            p = softmax(scores, self.seen, self.sink)
            error = np.sum(np.square(p @ values - self.theirs))
            yield fields, float(np.nan_to_num(error, nan=np.inf))

    def _of(self, choice: Choice, array: np.ndarray) -> Float64Array:
        part = np.s_[self.batch : self.batch + 1], np.s_[:], np.s_[self.kv : self.kv + 1]
        limits = None
        if choice.scaling is not WITHOUT:
            low, high = (
                y[tuple(s if n > 1 else np.s_[:] for s, n in zip(part, y.shape, strict=False))]
                for y in choice.scaling.limits(array)
            )
            limits = low, high
        return choice.of(wide(array[part]), limits)[0, :, 0]
