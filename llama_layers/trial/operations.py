"""Small inputs of a layer's operations: odd sizes, tails, every format, masks, NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import ml_dtypes
import numpy as np

from llama_layers.arrays.dispatch import Function, definitions
from llama_layers.arrays.dtypes import accumulate_format, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array, Namespace
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.mask import Mask
from llama_layers.layers.rope import rope_table
from llama_layers.trial.place import Case, Outcome, Place, outcome
from llama_layers.verify import (
    Bound,
    attention_bound,
    linear_bound,
    rms_norm_bound,
    rope_bound,
    swiglu_bound,
)

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
PAIRS = (*((name, name) for name in DTYPES), ("float32", "bfloat16"), ("float32", "float16"))
"""Formats of activations and of weights, which may be stored in fewer bits."""
POISON = (math.nan, math.inf, -math.inf)


def _drawn(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> np.ndarray:
    numbers = np.random.default_rng(seed).standard_normal(shape) * scale
    return numbers.astype(DTYPES[dtype])


def _outcomes(body: Function, name: str, cases: Iterable[Case], place: Place) -> Iterator[Outcome]:
    for case in cases:
        found = outcome(body, definitions[name], case, place)
        if found is not None:
            yield found


def activations(body: Function, place: Place) -> Iterator[Outcome]:
    """Embeddings, widened and not changed; the definition leaves their format to the backend."""

    def widened(xp: Namespace, x: np.ndarray) -> np.ndarray:
        return x.astype(accumulate_format(float_format("x", x)).name)

    def case(dtype: str, shape: tuple[int, ...]) -> Case:
        x = _drawn(0, *shape, dtype=dtype)
        exact, none = x.astype(np.float64), np.zeros(shape)
        return Case(
            f"{dtype} {list(shape)}", (x,), lambda x: (x,), lambda: Bound(exact, none, none)
        )

    for dtype in DTYPES:
        for shape in ((1, 1, 7), (2, 3, 33), (1, 40, 5)):
            found = outcome(body, widened, case(dtype, shape), place)
            if found is not None:
                yield found


def normalise(body: Function, place: Place) -> Iterator[Outcome]:
    """Rows that fill vectors and some that do not, of numbers of several sizes."""

    def case(
        dtype: str, kept: str, shape: tuple[int, ...], eps: float, what: float | None = None
    ) -> Case:
        x = _drawn(1, *shape, dtype=dtype)
        x.reshape(-1, shape[-1])[1::3] *= x.dtype.type(2.0**-9)
        x.reshape(-1, shape[-1])[2::3] = 0 if eps else 1
        if what is not None:
            x.reshape(-1, shape[-1])[0, -1] = what
        weight = (1 + _drawn(2, shape[-1]) / 4).astype(DTYPES[kept])
        return Case(
            f"{dtype}, weight {kept}, {list(shape)}",
            (x, weight),
            lambda x, weight: (x, weight, eps),
            lambda: rms_norm_bound(x, weight, eps=eps),
        )

    def cases() -> Iterator[Case]:
        for dtype, kept in PAIRS:
            for shape in ((5, 33), (1, 1, 1), (2, 3, 264), (3, 1030)):
                yield case(dtype, kept, shape, 1e-5)
        yield case("float32", "float32", (300, 257), 0.0)
        for dtype in DTYPES:
            for what in POISON:
                yield case(dtype, dtype, (3, 33), 1e-5, what)

    return _outcomes(body, "normalise", cases(), place)


def rotate(body: Function, place: Place) -> Iterator[Outcome]:
    """Heads within a fused projection, at positions shared or of each sequence."""

    def case(
        dtype: str,
        width: int,
        layout: Literal["half", "interleaved"],
        rows: int,
        seq: int = 5,
        what: float | None = None,
    ) -> Case:
        config = replace(LlamaConfig.llama2_7b(), head_dim=width)
        fused = _drawn(3, 2, seq, 5, width, dtype=dtype)
        if what is not None:
            fused[0, 1, 2, -1] = what
        positions = 3 + np.arange(seq) + 11 * np.arange(rows)[:, None]
        cos, sin = map(to_numpy, rope_table(positions, config, like=fused))
        return Case(
            f"{dtype}, heads of {width}, {layout}",
            (fused, cos, sin),
            lambda fused, cos, sin: (fused[:, :, :3], cos, sin, layout),
            lambda: rope_bound(fused[:, :, :3], positions, config, layout=layout),
        )

    def cases() -> Iterator[Case]:
        for dtype in DTYPES:
            for layout in ("half", "interleaved"):
                for width in (2, 6, 64, 80):
                    yield case(dtype, width, layout, rows=1 + width % 4 // 2)
                for what in POISON:
                    yield case(dtype, 6, layout, 2, what=what)
        yield case("float32", 48, "half", rows=2, seq=67)

    return _outcomes(body, "rotate", cases(), place)


def gate_with_silu(body: Function, place: Place) -> Iterator[Outcome]:
    """Gates whose exponentials overflow and vanish, in blocks and a rest."""

    def case(dtype: str, shape: tuple[int, ...], what: float | None = None) -> Case:
        gate, up = (_drawn(seed, *shape, dtype=dtype) for seed in (4, 5))
        flat = gate.reshape(-1)
        flat[::3] *= gate.dtype.type(9)
        flat[: flat.size // 5] *= gate.dtype.type(40)
        if what is not None:
            flat[-1] = what
        return Case(
            f"{dtype} {list(shape)}",
            (gate, up),
            lambda gate, up: (gate, up),
            lambda: swiglu_bound(gate, up),
        )

    def cases() -> Iterator[Case]:
        for dtype in DTYPES:
            for shape in ((1,), (3, 33), (2, 3, 130)):
                yield case(dtype, shape)
            for what in POISON:
                yield case(dtype, (3, 7), what)
        yield case("float32", (3, 11003))

    return _outcomes(body, "gate_with_silu", cases(), place)


def linear_2d(body: Function, place: Place) -> Iterator[Outcome]:
    """Few rows and many, with all tails of tiles, in one thread and several."""

    def case(
        formats: tuple[str, str],
        sizes: tuple[int, int, int],
        bias: str | None,
        what: float | None = None,
    ) -> Case:
        dtype, kept = formats
        tokens, rows, count = sizes
        x, weight = _drawn(6, tokens, count, dtype=dtype), _drawn(7, rows, count, dtype=kept)
        if what is not None:
            x[-1, -1] = weight[1, 0] = what
        others = () if bias is None else (_drawn(8, rows, dtype=bias),)
        return Case(
            f"{dtype} by {kept}, {tokens} x {count} to {rows}",
            (x, weight, *others),
            lambda x, weight, bias=None: (x, weight, bias),
            lambda: linear_bound(x, weight, *others, flushes=True),
        )

    def cases() -> Iterator[Case]:
        few = [(1, 37, 300), (3, 5, 33), (8, 21, 264)]
        pairs = [pair for pair in PAIRS if pair[0] != "float32" or place.single_products]
        for formats in pairs:
            for sizes in few:
                yield case(formats, sizes, formats[1])
            for sizes in [(16, 5, 33), (17, 37, 300), (45, 70, 531)]:
                yield case(formats, sizes, None if sizes[0] == 17 else formats[0])
            for what in POISON:
                yield case(formats, (3, 5, 33), None, what)
                yield case(formats, (19, 37, 70), None, what)
        for tokens in (5, 33):  # more than one thread is woken for
            for formats in pairs[:3]:
                yield case(formats, (tokens, 261, 301), None)

    return _outcomes(body, "linear_2d", cases(), place)


def attend(body: Function, place: Place) -> Iterator[Outcome]:
    """Groups of heads, tails of tiles, and masks of each kind, with rows that see nothing."""

    def case(
        dtype: str,
        sizes: tuple[int, int, int, int, int],
        kind: str,
        scale: float = 1.0,
        what: float | None = None,
    ) -> Case:
        queries, keys, heads, kv_heads, width = sizes
        q = _drawn(9, 2, queries, heads, width, dtype=dtype, scale=scale)
        k, v = (_drawn(seed, 2, keys, kv_heads, width, dtype=dtype) for seed in (10, 11))
        if what is not None:
            k[0, 1, 0, -1] = what
        slots = np.arange(keys - queries, keys), np.arange(keys)
        keep = np.random.default_rng(12).random((2, keys)) < 0.7
        keep[1, : keys - queries // 2] = False  # the first queries of it see nothing
        window = 5 if "window" in kind else None
        mask = Mask(*slots, window, keep if "padding" in kind else None)
        boolean = to_numpy(mask.rows(0, queries))
        given: tuple[np.ndarray, ...] = (*slots, *(() if mask.keep is None else (keep,)))
        if kind in ("none", "boolean"):
            given = () if kind == "none" else (boolean,)

        def arguments(q: Array, k: Array, v: Array, *arrays: Array) -> tuple[object, ...]:
            if kind == "none":
                there: Mask | Array | None = None
            elif kind == "boolean":
                there = arrays[0]
            else:
                there = Mask(arrays[0], arrays[1], window, *arrays[2:])
            return q, k, v, there, 1 / math.sqrt(width)

        return Case(
            f"{dtype}, {queries} queries, {keys} keys, {heads} and {kv_heads} heads of {width}, "
            f"mask: {kind}",
            (q, k, v, *given),
            arguments,
            lambda: attention_bound(q, k, v, mask=None if kind == "none" else boolean),
        )

    def cases() -> Iterator[Case]:
        # float16 values are widened to float32, whose products they then are
        dtypes = DTYPES if place.single_products else ("bfloat16", "float64")
        for dtype in dtypes:
            for kind in ("none", "boolean", "causal", "padding", "window and padding"):
                yield case(dtype, (7, 19, 6, 2, 10), kind)
            yield case(dtype, (1, 21, 4, 4, 16), "window")
            yield case(dtype, (13, 13, 3, 1, 33), "causal", scale=12.0)
            for what in POISON:
                yield case(dtype, (5, 9, 4, 2, 6), "causal", what=what)
        if place.single_products:
            yield case("float32", (133, 141, 8, 2, 24), "window and padding")  # several blocks

    return _outcomes(body, "attend", cases(), place)
