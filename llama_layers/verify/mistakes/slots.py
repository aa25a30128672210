"""Mistakes in which tokens' keys and values attention reads: one late, or of other slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import FailingSite, wide
from llama_layers.verify.mistakes.attention import GROUPED
from llama_layers.verify.mistakes.attention_arrays import (
    scores_of,
    sinks_of,
    softmax,
    values_of,
)
from llama_layers.verify.mistakes.masks import window_of
from llama_layers.verify.mistakes.near import other_inputs, worst_tokens
from llama_layers.verify.mistakes.registry import Changed, Kind, mistake
from llama_layers.verify.operations import Attention, Operation
from llama_layers.verify.report.wording import listed
from llama_layers.verify.roundoff import Float64Array

_NAMES = {"k": "keys", "v": "values"}
# Tokens of a page of a cache, and how many tokens a page may be looked for among.
_PAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FEW_TOKENS = 512
# Heads in which it is looked for.
_HEADS = 2


def _late(array: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """An array moved by a token: around the end, or with zeros or the end once more there."""
    moved = np.roll(array, step, axis=1)
    end = 0 if step > 0 else -1
    yield moved
    for first in (np.zeros_like(array[:, 0]), array[:, end]):
        other = moved.copy()
        other[:, end] = first
        yield other


@mistake(GROUPED, "keys or values of the token beside")
def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
    """Reads at each token the {0} of the token {1} it; it should read its own."""
    for field in [name for name in _NAMES if hasattr(operation, name)]:
        for step, said in ((1, "before"), (-1, "after")):
            for array in _late(getattr(operation, field), step):
                if changed := other_inputs(operation, at, **{field: array}):  # type: ignore[arg-type]
                    yield changed, _NAMES[field], said


@mistake(GROUPED, "another sequence's keys and values")
def _(operation: Operation, at: FailingSite) -> Iterator[Changed]:
    """Reads {0} of {1}; it should read those of its own sequence."""
    batch = len(at.computed)
    fields = [name for name in _NAMES if hasattr(operation, name)]
    orders: dict[tuple[int, ...], str] = {}
    for step in range(1, min(batch, 5)):
        orders[tuple(np.roll(np.arange(batch), step).tolist())] = f"the sequence {step} before"
    for row in range(min(batch, 5)) if batch > 1 else ():
        orders.setdefault((row,) * batch, f"sequence {row}")
    orders.setdefault(tuple(range(batch - 1, -1, -1)), "the sequences in reverse order")
    for order, said in orders.items():
        for some in (fields, *([name] for name in fields if len(fields) > 1)):
            arrays = {name: getattr(operation, name)[list(order)] for name in some}
            if batch > 1 and (changed := other_inputs(operation, at, **arrays)):  # type: ignore[arg-type]
                yield changed, " and ".join(_NAMES[name] for name in some), said


@mistake(Attention, "values of other heads", kind=Kind.SOLVED)
def _(attention: Attention, at: FailingSite) -> Changed | None:
    """Weighs for its query heads the values of heads {0}; it should weigh those of heads {1}."""
    # For each query head the head of values that fits best in the worst tokens.
    heads, groups = attention.q.shape[2], attention.v.shape[2]
    if groups == 1:
        return None
    few = worst_tokens(at, 4)
    scores = scores_of(replace(attention, q=attention.q[:, few]))
    mask = np.asarray(attention.mask)[:, None, few]
    p = softmax(scores, np.broadcast_to(mask, scores.shape), sinks_of(attention))
    v = wide(attention.v).transpose(0, 2, 1, 3)
    every = p[:, :, None] @ v[:, None]  # [B, heads, kv, few, D]
    theirs = wide(at.computed)[:, few].transpose(0, 2, 1, 3)[:, :, None]
    errors = np.nan_to_num(np.sum(np.square(every - theirs), axis=(0, 3, 4)), nan=np.inf)
    found, right = errors.argmin(axis=1), np.arange(heads) * groups // heads
    if (found == right).all():
        return None
    k = np.repeat(attention.k, heads // groups, axis=2)
    changed = replace(attention, k=k, v=attention.v[:, :, found])
    return changed, listed(found.tolist(), 8), listed(right.tolist(), 8)


@dataclass(frozen=True)
class _Page:
    """A page of the cache, and what is read at it."""

    slots: NDArray[np.intp]
    read: str | NDArray[np.intp]
    """Tokens, counted through all sequences; or "nothing", "zeros" or "twice" what is there."""
    fields: str = "kv"
    """Whether that is so of keys, of values or of both."""


class _Query:
    """One query of the worst heads, over the keys of all sequences."""

    def __init__(self, attention: Attention, at: FailingSite, batch: int, token: int) -> None:
        self.count = at.recorded.count
        heads = np.argsort(-at.ratio[batch, token].max(axis=-1), kind="stable")[:_HEADS]
        groups = attention.q.shape[2] // attention.k.shape[2]
        k, v = (wide(y)[:, :, heads // groups] for y in (attention.k, attention.v))
        k, v = (y.reshape(1, -1, *y.shape[2:]) for y in (k, v))
        q = attention.q[batch : batch + 1, token : token + 1, heads]
        sinks = sinks_of(attention)[heads, :, 0]
        one = replace(attention, q=q, k=k, v=v, sinks=None)
        scores, self.values = scores_of(one)[0, :, 0], values_of(one)[0]
        self.own = batch * self.count
        shape = (len(attention.q), self.count, self.count)
        self.seen = np.broadcast_to(np.asarray(attention.mask), shape)[batch, token]
        own = scores[:, self.own : self.own + self.count]
        largest = np.where(self.seen, own, -np.inf).max(axis=-1, keepdims=True)
        self.largest = np.maximum(largest, sinks)
        self.e, self.sinks = np.exp(scores - self.largest), np.exp(sinks - self.largest)
        self.theirs = wide(at.computed)[batch, token, heads]
        self.token = token

    def left(self, size: int) -> Iterator[tuple[float, _Page]]:
        """The error that is left with what explains each page of that size best."""
        terms = _terms(self.e, self.values)
        visible = terms[:, self.own : self.own + self.count] * self.seen[:, None]
        whole = visible.sum(axis=1)
        whole[:, -1:] += self.sinks
        for start in range(0, self.token + 1, size):
            slots = np.arange(start, min(start + size, self.token + 1))
            if not self.seen[slots].all():
                continue
            own = visible[:, slots].sum(axis=1)
            rest = (whole - own)[:, None]
            zeros = np.zeros_like(own)
            zeros[:, -1] = len(slots) * np.exp(-self.largest[:, 0])
            errors = self._errors(rest + np.stack([np.zeros_like(own), zeros, 2 * own], axis=1))
            if start == 0 or slots[-1] == self.token:
                errors[0] = np.inf  # which is another run of tokens that are seen
            best = int(np.argmin(errors))
            yield float(errors[best]), _Page(slots, _KINDS[best])
            # Pages of all sequences.
            first = np.arange(0, self.count - len(slots) + 1, size)
            sequences = np.arange(0, self.e.shape[1], self.count)
            places = (sequences[:, None] + first).ravel()[:, None] + np.arange(len(slots))
            places = places[places[:, 0] != self.own + start]
            if not len(places):
                continue
            here = self.own + slots[None]
            for fields, e, v in (("kv", places, places), ("k", places, here), ("v", here, places)):
                others = _terms(self.e[:, e], self.values[:, v]).sum(axis=2)
                errors = self._errors(rest + others)
                best = int(np.argmin(errors))
                yield float(errors[best]), _Page(slots, places[best], fields)

    def _errors(self, sums: Float64Array) -> Float64Array:
        with np.errstate(all="ignore"):
            y = sums[..., :-1] / sums[..., -1:]
            errors = np.sum(np.square(y - self.theirs[:, None]), axis=(0, 2))
        return np.where(np.isnan(errors), np.inf, errors)


_KINDS = ("nothing", "zeros", "twice")


def _terms(e: Float64Array, values: Float64Array) -> Float64Array:
    """Exponentials times values, and beside them the exponentials."""
    shape = np.broadcast_shapes(e.shape, values.shape[:-1])
    products = e[..., None] * values
    return np.concatenate([products, np.broadcast_to(e, shape)[..., None]], axis=-1)


@mistake(Attention, "another page of the cache", kind=Kind.SOLVED)
def _(attention: Attention, at: FailingSite) -> Iterator[Changed]:
    """Reads {0}; it should read each token's own keys and values, once."""
    # Looked for in the last of the wrong queries, and held against the others. With a window, the
    # last may see a part of the page only: then in those before it, too.
    count = at.recorded.count
    wrong = np.argwhere((at.ratio > 1).any(axis=(2, 3)))
    if not len(wrong) or not 1 < count <= _FEW_TOKENS:
        return
    batch = int(wrong[-1, 0])
    tokens = [int(token) for sequence, token in wrong if sequence == batch]
    places = (-1,) if window_of(at) is None else (-1, len(tokens) // 2, 0)
    for token in dict.fromkeys(tokens[place] for place in places):
        yield from _page_in(attention, at, batch, token)


def _page_in(attention: Attention, at: FailingSite, batch: int, token: int) -> Iterator[Changed]:
    """The page that explains a query best."""
    count = at.recorded.count
    query = _Query(attention, at, batch, token)
    found = [each for size in _PAGES if size < count for each in query.left(size)]
    least = min((error for error, _ in found), default=np.inf)
    size = float(np.sum(np.square(query.theirs)))
    if not least < 1e-3 * size:
        return
    # The largest page that explains as much.
    alike = [page for error, page in found if error <= 4 * least + 1e-12 * size]
    page = max(alike, key=lambda page: len(page.slots))
    yield from _read(attention, page, batch, count)


def _read(attention: Attention, page: _Page, batch: int, count: int) -> Iterator[Changed]:
    slots, there = page.slots, _tokens(page.slots)
    if isinstance(page.read, str) and page.read != "zeros":
        mask = np.array(
            np.broadcast_to(np.asarray(attention.mask), (len(attention.q), count, count))
        )
        if page.read == "nothing":
            mask[:, :, slots] = False
            yield replace(attention, mask=mask), f"nothing at {there}"
        else:
            counts = np.where(mask, 1.0, 0.0)
            counts[:, :, slots] *= 2
            with np.errstate(divide="ignore"):
                yield replace(attention, mask=np.log(counts)), f"{there} twice"
        return
    changed = {name: getattr(attention, name).copy() for name in page.fields}
    said = "zeros"
    for name, array in changed.items():
        if isinstance(page.read, str):
            array[:, slots] = 0
            continue
        every, (of, rows) = getattr(attention, name), np.divmod(page.read, count)
        said = f"those of {_tokens(rows)}"
        if (of == batch).all():
            array[:, slots] = every[:, rows]
        else:
            array[batch, slots] = every[of, rows]
            said += f" of sequence {of[0]}"
    words = " and ".join(_NAMES[name] for name in page.fields)
    yield replace(attention, **changed), f"for the {words} of {there} {said}"


def _tokens(places: NDArray[np.intp]) -> str:
    first, last = places[0], places[-1]
    return f"token {first}" if first == last else f"tokens {first}..{last}"
