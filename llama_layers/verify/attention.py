"""Operations of attention, computed a tile at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Generic

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.checks import check_finite
from llama_layers.arrays.dtypes import FloatFormat, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.layers.attention import check_sinks, checked_softcap
from llama_layers.verify.bound import Bound
from llama_layers.verify.operation import Operation, Stored
from llama_layers.verify.pointwise import soft_capped
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.rules import Weights, dot
from llama_layers.verify.tracked import Tracked, read

# Scores held in float64 at a time, in each of the arrays that a bound is made of: 8 MiB.
TILE = 1 << 20


@dataclass(frozen=True, eq=False)
class Heads:
    """Query heads, the key heads that they read, and a mask; only what an operation reads.

    Axes are batch, key heads, the query heads that read one, and two more.
    """

    q: Tracked | None = None  # queries, [B, kv_heads, group, S, D]
    k: Tracked | None = None  # keys, [B, kv_heads, 1, T, D]
    v: Tracked | None = None  # values, [B, kv_heads, 1, T, D]
    given: Tracked | None = None  # recorded scores or probabilities, [B, kv_heads, group, S, T]
    mask: np.ndarray | None = None  # [B, 1, 1, S, T]: which keys may be seen, or what to add
    scale: float = 1.0  # of the products of queries and keys
    cap: float | None = None  # of these, scaled
    sinks: np.ndarray | None = None  # what joins the scores of each head, [1, kv, group, 1, 1]

    @property
    def allowed(self) -> NDArray[np.bool_] | None:
        """The keys that may be seen, [B, 1, 1, S, T]; None for all."""
        return None if self.mask is None or self.mask.dtype != bool else self.mask

    def scores(self) -> Tracked:
        """The scores, with a mask added that is one to add."""
        if self.q is None or self.k is None:
            assert self.given is not None
            scores = self.given
        else:
            if _scales_queries(self.scale, self.q.how):
                scores = dot((self.q * self.scale).step("kv_cache"), self.k)
            else:
                scores = dot(self.q, self.k, scale=self.scale)
            if self.cap is not None:
                scores = soft_capped(scores, self.cap, "scores")
        if self.mask is None or self.mask.dtype == bool:
            return scores
        total = scores + self.mask.astype(np.float64)
        return total.step("scores")

    def softmax(self, blocks: int = 0) -> Weights:
        """The softmax of the scores over the keys that are allowed, and the sink, which is last."""
        return self._softmax(self.scores(), self.allowed, blocks)

    def probabilities(self) -> Tracked:
        """The probabilities of the keys."""
        return self.probabilities_of(self.scores(), self.allowed)

    def probabilities_of(
        self, scores: Tracked, allowed: NDArray[np.bool_] | None = None
    ) -> Tracked:
        """The probabilities of keys that have these scores."""
        found = self._softmax(scores, allowed).probabilities()
        return found if self.sinks is None else found[..., :-1]

    def _softmax(
        self, scores: Tracked, allowed: NDArray[np.bool_] | None, blocks: int = 0
    ) -> Weights:
        if self.sinks is not None:
            keys = np.arange(scores.shape[-1] + 1) < scores.shape[-1]
            scores = scores.moved(partial(_one_more, axis=-1))
            scores = scores.where(keys, self.sinks)
            if allowed is not None:
                allowed = np.concatenate([allowed, np.ones_like(allowed[..., :1])], axis=-1)
        return Weights.of(scores, allowed, blocks)

    def weigh(self, weights: Tracked) -> Tracked:
        """The values weighed, or the weights where an operation reads no values."""
        if self.v is None:
            return weights
        return self.weighted_sum(weights.step("probabilities").step("kv_cache"))

    def weighted_sum(self, weights: Tracked) -> Tracked:
        """The values weighed; an engine may leave out keys that weigh nothing, and their NaN."""
        assert self.v is not None
        total = dot(weights, self.v.moved(lambda values: values.swapaxes(-1, -2)))
        return total.only(np.isfinite(total.exact))


@dataclass(frozen=True)
class Tile:
    """Some queries of the heads that read some key heads, in some sequences."""

    batch: slice
    kv: slice
    rows: slice
    group: int  # query heads that read a key head

    @property
    def heads(self) -> slice:
        """The query heads."""
        return slice(self.kv.start * self.group, self.kv.stop * self.group)

    def read(
        self, arrays: dict[str, np.ndarray], how: Rounding, scale: float
    ) -> dict[str, Tracked]:
        """The part of q, k, v and what is given that a tile reads, as tracked numbers."""
        b, kv, heads, rows = self.batch, self.kv, self.heads, self.rows
        parts: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "q": lambda q: self.grouped(q[b, rows, heads].transpose(0, 2, 1, 3)),
            "k": lambda k: k[b, :, kv].transpose(0, 2, 1, 3)[:, :, None],
            "v": lambda v: v[b, :, kv].transpose(0, 2, 1, 3)[:, :, None],
            "given": lambda given: self.grouped(given[b, heads, rows]),
        }
        cached = len(arrays) > 1  # scores alone are not read from a cache
        caches = {n: _cache(n, how) if cached else None for n in arrays}
        if _scales_queries(scale, how):
            caches["q"] = None  # they are rounded when they are scaled
        return {n: read(n, parts[n](array), how, cache=caches[n]) for n, array in arrays.items()}

    def grouped(self, array: np.ndarray) -> np.ndarray:
        """An array [batch, heads, ...] as [batch, key heads, group, ...]."""
        batch, heads, *rest = array.shape
        return array.reshape(batch, heads // self.group, self.group, *rest)

    def sinks(self, sinks: Array | None) -> np.ndarray | None:
        """The sinks of the tile's heads, as `Heads` has them."""
        if sinks is None:
            return None
        return to_numpy(sinks)[self.heads].astype(np.float64).reshape(1, -1, self.group, 1, 1)

    def write(self, by_head: np.ndarray, part: np.ndarray) -> None:
        """Put what was computed of a tile into an array [batch, heads, queries, ...]."""
        batch, kv, group, *rest = part.shape
        by_head[self.batch, self.heads, self.rows] = part.reshape(batch, kv * group, *rest)


def _scales_queries(scale: float, how: Rounding) -> bool:
    """Whether rounded queries are other numbers because they were scaled before."""
    return how.profile.scaled_queries and abs(math.frexp(scale)[0]) != 0.5


def _cache(name: str, how: Rounding) -> FloatFormat | None:
    """The format that attention reads an array in."""
    stored = how.step("cache") if name in ("k", "v") else None
    return stored or how.step("kv_cache")


def tiles(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, rows: int | None = None
) -> Iterator[Tile]:
    """All queries of all heads, as many at a time as give `TILE` scores; or `rows` at least."""
    group = heads // kv_heads
    step = max(1, TILE // max(1, group * keys) if rows is None else rows)
    # Of few queries the keys are the larger array; most heads have 128 channels.
    size = keys * max(group * queries, 128)
    several = max(1, TILE // max(1, size)) if step >= queries else 1
    kv_step, b_step = min(several, kv_heads), max(1, several // kv_heads)
    for b in _slices(batch, b_step):
        for kv in _slices(kv_heads, kv_step):
            for some in _slices(queries, step):
                yield Tile(b, kv, some, group)


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def check_heads(q: Array, **others: Array) -> None:
    """Raise ValueError unless arrays are [B, S, heads, D] and [B, T, kv_heads, D]."""
    float_format("q", q)
    if len(q.shape) != 4:
        raise ValueError(f"q: expected shape [B, S, heads, D], got {list(q.shape)}")
    batch, _, heads, width = q.shape
    for name, array in others.items():
        float_format(name, array)
        shape = tuple(array.shape)
        if len(shape) != 4 or (shape[0], shape[3]) != (batch, width):
            raise ValueError(
                f"{name}: expected shape [{batch}, T, kv_heads, {width}], got {list(shape)}"
            )
        if not shape[2] or heads % shape[2]:
            raise ValueError(f"{name}: expected heads in a divisor of q's {heads}, got {shape[2]}")


def broadcast_mask(mask: Array | None, batch: int, queries: int, keys: int) -> np.ndarray | None:
    """The mask [B, S, T]; a ValueError unless it has that shape, or lacks B."""
    if mask is None:
        return None
    array = to_numpy(mask)
    if array.dtype != bool:
        float_format("mask", mask)
    expected = (queries, keys)
    if array.shape not in (expected, (1, *expected), (batch, *expected)):
        raise ValueError(
            f"mask: expected shape {list(expected)} or {[batch, *expected]}, "
            f"got {list(array.shape)}"
        )
    return np.broadcast_to(array, (batch, *expected))


class OverHeads(Operation[Heads]):
    """An operation of attention, computed for some query heads at a time.

    Its fields are some of ``q`` [B, S, heads, D], ``k`` and ``v`` [B, T, kv_heads, D], ``scores``
    or ``probabilities`` [B, heads, S, T], ``mask`` [S, T], [1, S, T] or [B, S, T], of bool or, to
    be added to the scores, of floats, ``scale``, ``cap``, of scores, and ``sinks`` [heads].
    """

    by_token = True

    def check(self) -> None:
        """Raise ValueError or TypeError unless the fields fit each other."""
        fields = vars(self)
        check_heads(fields["q"], k=fields["k"])
        check_finite("scale", fields["scale"])

    def evaluate(self, formula: Callable[[Heads], Tracked], how: Rounding) -> Bound:
        """The exact result of a formula, and what rounding allows.

        The operation's own is evaluated for some queries at a time, another for all of them.
        """
        self.check()
        how = how.inside(self.steps)
        names = {n: n if n in ("q", "k", "v") else "given" for n in self.inputs}
        arrays = {name: to_numpy(getattr(self, n)) for n, name in names.items()}
        if "given" in arrays:
            batch, heads, queries, keys = arrays["given"].shape
        else:
            (batch, queries, heads, _), keys = arrays["q"].shape, arrays["k"].shape[1]
        mask = broadcast_mask(vars(self).get("mask"), batch, queries, keys)
        kv_heads = next((arrays[name].shape[2] for name in ("k", "v") if name in arrays), heads)
        if "v" in arrays:
            shape = (batch, queries, heads, arrays["v"].shape[3])
            results = [np.zeros(shape) for _ in range(3)]
            by_head = [array.transpose(0, 2, 1, 3) for array in results]
        else:
            by_head = results = [np.zeros((batch, heads, queries, keys)) for _ in range(3)]
        cap, given = checked_softcap(vars(self).get("cap")), vars(self).get("sinks")
        if given is not None:
            float_format("sinks", given)
            check_sinks(given, heads)
        rows = None if formula is type(self).formula else queries
        for tile in tiles(batch, queries, keys, heads, kv_heads, rows):
            some = None if mask is None else mask[tile.batch, None, None, tile.rows]
            scale, sinks = vars(self).get("scale", 1.0), tile.sinks(given)
            some_heads = Heads(
                **tile.read(arrays, how, scale), mask=some, scale=scale, cap=cap, sinks=sinks
            )
            bound = formula(some_heads).bound()
            for array, part in zip(by_head, (bound.exact, bound.limit, bound.usual), strict=True):
                tile.write(array, part)
        return Bound(*results)


@dataclass(frozen=True, eq=False)
class Scores(OverHeads, Generic[Stored]):
    """Scaled products of queries and keys, of which those that a mask allows count."""

    inputs = ("q", "k")
    steps: ClassVar[tuple[str, ...]] = ("kv_cache", "scaled_queries", "cache", "scores")
    q: Stored
    k: Stored
    mask: Stored | None
    scale: float
    cap: float | None = None
    sinks: Stored | None = None

    @staticmethod
    def formula(heads: Heads) -> Tracked:
        """The scores; those that are not allowed may be anything."""
        scores = heads.scores()
        return scores if heads.allowed is None else scores.only(heads.allowed)


@dataclass(frozen=True, eq=False)
class Softmax(OverHeads, Generic[Stored]):
    """Softmax of scores [B, heads, S, T] over the keys that a mask allows."""

    inputs = ("scores",)
    steps = ("softmax_in",)
    scores: Stored
    mask: Stored | None
    sinks: Stored | None = None

    def check(self) -> None:
        """Raise ValueError or TypeError unless the scores are [B, heads, S, T]."""
        _check_pairwise("scores", self.scores)

    @staticmethod
    def formula(heads: Heads) -> Tracked:
        """The probabilities."""
        return heads.probabilities()


@dataclass(frozen=True, eq=False)
class Probabilities(Scores[Stored]):
    """Softmax of scaled products of queries and keys."""

    steps = (*Scores.steps, "softmax_in")
    formula = Softmax.formula


@dataclass(frozen=True, eq=False)
class WeightedSum(OverHeads, Generic[Stored]):
    """The values, weighed by probabilities [B, heads, S, T]."""

    inputs = ("probabilities", "v")
    steps = ("kv_cache", "cache")
    probabilities: Stored
    v: Stored

    def check(self) -> None:
        """Raise ValueError or TypeError unless there are values for the probabilities."""
        _check_pairwise("probabilities", self.probabilities)
        float_format("v", self.v)
        batch, heads, _, keys = self.probabilities.shape
        shape = tuple(self.v.shape)
        fits = len(shape) == 4 and shape[:2] == (batch, keys)
        if not fits or not shape[2] or heads % shape[2]:
            raise ValueError(
                f"v: expected shape [{batch}, {keys}, kv_heads, D], kv_heads a divisor of {heads}, "
                f"got {list(shape)}"
            )

    @staticmethod
    def formula(heads: Heads) -> Tracked:
        """The sums."""
        assert heads.given is not None
        return heads.weighted_sum(heads.given)


@dataclass(frozen=True, eq=False)
class Attention(OverHeads, Generic[Stored]):
    """Scores, softmax and weighted sum at once, as fused kernels compute them."""

    inputs = ("q", "k", "v")
    steps = (
        *("kv_cache", "scaled_queries", "cache"),
        *("scores", "probabilities", "weighted_sums", "softmax_in"),
    )
    q: Stored
    k: Stored
    v: Stored
    mask: Stored | None
    scale: float
    cap: float | None = None
    sinks: Stored | None = None

    def check(self) -> None:
        """Raise ValueError or TypeError unless queries, keys and values fit each other."""
        check_heads(self.q, k=self.k, v=self.v)
        if tuple(self.k.shape) != tuple(self.v.shape):
            raise ValueError(
                f"v: expected shape {list(self.k.shape)} of k, got {list(self.v.shape)}"
            )
        check_finite("scale", self.scale)

    @staticmethod
    def formula(heads: Heads) -> Tracked:
        """The values, weighed with the softmax of the scores."""
        assert heads.v is not None
        blocks = -(-heads.v.shape[-2] // heads.v.how.profile.block)
        v = heads.v if heads.sinks is None else heads.v.moved(partial(_one_more, axis=-2))
        return heads.softmax(blocks).weigh(v)


def _one_more(array: np.ndarray, axis: int) -> np.ndarray:
    """An array with zeros after its last numbers along an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, 1)
    return np.pad(array, widths)


def _check_pairwise(name: str, array: Array) -> None:
    float_format(name, array)
    if len(array.shape) != 4:
        raise ValueError(f"{name}: expected shape [B, heads, S, T], got {list(array.shape)}")
