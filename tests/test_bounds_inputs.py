"""Bounds for engines that go on with more digits than they write out.

The inputs that such an engine computed from are float32 numbers; what is recorded is rounded. Each
operation is computed here in float64 from the former, and judged by the latter.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from llama_layers import LlamaConfig
from llama_layers.verify import (
    attention_bound,
    geglu_bound,
    judge,
    linear_bound,
    probabilities_bound,
    residual_bound,
    rms_norm_bound,
    rope_bound,
    scores_bound,
    softmax_bound,
    swiglu_bound,
    weighted_sum_bound,
)
from tests.support import engines
from tests.support.bounds_cases import ROUNDOFF, TINY, causal
from tests.support.engines import DTYPES

NARROW = pytest.mark.parametrize("dtype", engines.NARROW)
FIXED = np.random.default_rng(7)
MATRIX = FIXED.standard_normal((5, 64)).astype(np.float32)
BIAS = FIXED.standard_normal(5).astype(np.float32)
SCALES = FIXED.standard_normal(64).astype(np.float32)
CONFIG = replace(LlamaConfig.smollm2_135m(), head_dim=8, rope_theta=10.0)
PLACES = np.array([0, 3, 40])
Q, K, KEYS = (1, 3, 4, 16), (1, 24, 2, 16), 24
MASK = causal(3, KEYS)


def norm(x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * SCALES


def rope(x):
    phases = PLACES[:, None] * CONFIG.rope_theta ** (-np.arange(4) / 4)
    c, s = np.cos(phases)[:, None], np.sin(phases)[:, None]
    a, b = x[..., :4], x[..., 4:]
    return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)


def scores(q, k):
    return 0.25 * q.transpose(0, 2, 1, 3) @ engines.repeated(k, 4).swapaxes(2, 3)


def softmax(a):
    a = np.where(MASK, a, -np.inf)
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def weighted(p, v):
    return (p @ engines.repeated(v, 4)).transpose(0, 2, 1, 3)


class Operation(NamedTuple):
    exact: object
    bound: object
    shapes: tuple
    reached: float
    """How much of the limit the worst inputs reach."""


OPERATIONS = {
    "linear": Operation(
        lambda x: x @ MATRIX.T.astype(float),
        lambda x, **o: linear_bound(x, MATRIX, **o),
        ((2, 64),),
        0.97,
    ),
    "linear with a bias": Operation(
        lambda x: x @ MATRIX.T.astype(float) + BIAS,
        lambda x, **o: linear_bound(x, MATRIX, BIAS, **o),
        ((2, 64),),
        0.97,
    ),
    "norm": Operation(
        norm, lambda x, **o: rms_norm_bound(x, SCALES, eps=1e-5, **o), ((2, 64),), 0.9
    ),
    "rope": Operation(
        rope, lambda x, **o: rope_bound(x, PLACES, CONFIG, **o), ((1, 3, 2, 8),), 0.97
    ),
    "gate": Operation(
        lambda g, h: g / (1 + np.exp(-g)) * h,
        lambda g, h, **o: swiglu_bound(g, h, **o),
        ((64,), (64,)),
        0.97,
    ),
    "gate with gelu": Operation(
        lambda g, h: g * (0.5 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)) / 2) * h,
        lambda g, h, **o: geglu_bound(g, h, **o),
        ((64,), (64,)),
        0.7,
    ),
    "residual": Operation(
        lambda a, b: a + b, lambda a, b, **o: residual_bound(a, b, **o), ((64,), (64,)), 0.97
    ),
    "scores": Operation(
        scores, lambda q, k, **o: scores_bound(q, k, scale=0.25, **o), (Q, K), 0.97
    ),
    "softmax": Operation(
        softmax, lambda a, **o: softmax_bound(a, mask=MASK, **o), ((1, 2, 3, KEYS),), 0.8
    ),
    "probabilities": Operation(
        lambda q, k: softmax(scores(q, k)),
        lambda q, k, **o: probabilities_bound(q, k, mask=MASK, scale=0.25, **o),
        (Q, K),
        0.5,
    ),
    "weighted sum": Operation(
        lambda p, v: weighted(abs(p), v),
        lambda p, v, **o: weighted_sum_bound(abs(p), v, **o),
        ((1, 4, 3, KEYS), K),
        0.97,
    ),
    "attention": Operation(
        lambda q, k, v: weighted(softmax(scores(q, k)), v),
        lambda q, k, v, **o: attention_bound(q, k, v, mask=MASK, scale=0.25, **o),
        (Q, K, K),
        0.5,
    ),
    "attention of equal scores": Operation(
        lambda v: weighted(MASK / MASK.sum(axis=1, keepdims=True), v),
        lambda v, **o: attention_bound(np.zeros(Q, v.dtype), v, v, mask=MASK, **o),
        (K,),
        0.97,
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", OPERATIONS)


def wide(arrays):
    return [array.astype(np.float64) for array in arrays]


@NARROW
@EACH
def test_within_the_limit_of_what_was_recorded(rng, name, dtype):
    exact, bound, shapes, _ = OPERATIONS[name]
    used = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    recorded = [array.astype(DTYPES[dtype]) for array in used]
    y = exact(*wide(used))
    for out in (dtype, "float32"):
        result = y.astype(DTYPES[out])
        allowed = bound(*recorded, dtype=out, inputs=dtype)
        assert judge(result, allowed).verdict == "PASS"
        assert (allowed.usual <= allowed.limit).all()
    # In the result's own digits the inputs' roundings are seen.
    assert judge(result, bound(*recorded, dtype="float32")).verdict == "FAIL"
    assert judge(exact(*wide(recorded)).astype(np.float32), allowed).verdict == "PASS"


def gradients(exact, arrays, place):
    """Of one element of the result, by each element of the inputs."""
    found = [np.zeros(array.shape) for array in arrays]
    for array, gradient in zip(arrays, found, strict=True):
        for index in np.ndindex(*array.shape):
            before, step = array[index], 1e-6 * (1 + abs(array[index]))
            array[index] = before + step
            above = exact(*arrays)[place]
            array[index] = before - step
            gradient[index] = above - exact(*arrays)[place]
            array[index] = before
    return found


def worst(exact, recorded, place, dtype):
    """Numbers that are rounded to the recorded ones and move one element of the result most."""
    u = ROUNDOFF[dtype] * (1 - 2.0**-10)
    moves = [np.sign(g) for g in gradients(exact, wide(recorded), place)]
    unit = [2.0 ** np.floor(np.log2(abs(array))) for array in wide(recorded)]
    numbers = [a + u * s * n for a, s, n in zip(wide(recorded), unit, moves, strict=True)]
    for number, array in zip(numbers, recorded, strict=True):
        np.testing.assert_array_equal(number.astype(np.float32).astype(DTYPES[dtype]), array)
    return numbers


@EACH
def test_worst_inputs_reach_the_limit_and_stay_within(rng, name):
    """Inputs just above powers of two, where roundings weigh most."""
    exact, bound, shapes, reached = OPERATIONS[name]
    recorded = [
        (rng.choice([-1, 1], shape) * (2.0 ** rng.integers(-2, 1, shape) * (1 + 2.0**-7)))
        for shape in shapes
    ]
    recorded = [array.astype(DTYPES["bfloat16"]) for array in recorded]
    allowed = bound(*recorded, dtype="float32", inputs="bfloat16")
    center = exact(*wide(recorded))
    ratios = []
    for place in [tuple(rng.integers(0, n) for n in center.shape) for _ in range(12)]:
        if not allowed.exact[place]:
            continue
        y = exact(*worst(exact, recorded, place, "bfloat16"))
        ratios.append(float(allowed.ratio(y)[place]))
        assert ratios[-1] <= 1
    assert max(ratios) > reached


def test_roundings_rarely_all_go_one_way(rng):
    """Of 64 products they usually cancel: 4 sqrt(64) of them, not 64."""
    u = 2.0**-8 / (1 - 2.0**-8)
    x = (rng.standard_normal((2, 64))).astype(DTYPES["bfloat16"])
    bound = linear_bound(x, MATRIX, dtype="float32", inputs="bfloat16")
    squares = np.square(wide([x])[0]) @ np.square(MATRIX.astype(float)).T
    np.testing.assert_allclose(bound.usual, 4 * u * np.sqrt(squares), rtol=1e-2)
    np.testing.assert_allclose(bound.limit, u * abs(wide([x])[0]) @ abs(MATRIX.T), rtol=1e-2)
    q, k, v = (rng.standard_normal(s).astype(DTYPES["bfloat16"]) for s in ((1, 3, 4, 64), K, K))
    k = rng.standard_normal((1, 5, 2, 64)).astype(DTYPES["bfloat16"])
    bound = scores_bound(q, k, scale=0.25, dtype="float32", inputs="bfloat16")
    squares = scores(np.square(wide([q])[0]), np.square(wide([k])[0])) / 0.25
    np.testing.assert_allclose(bound.usual, 0.25 * 4 * u * np.sqrt(2 * squares), rtol=1e-2)
    p = rng.random((1, 4, 3, KEYS)).astype(DTYPES["bfloat16"])
    bound = weighted_sum_bound(p, v, dtype="float32", inputs="bfloat16")
    squares = weighted(np.square(wide([p])[0]), np.square(wide([v])[0]))
    np.testing.assert_allclose(bound.usual, 4 * u * np.sqrt(2 * squares), rtol=1e-2)
    bound = rms_norm_bound(x, SCALES, eps=1e-5, dtype="float32", inputs="bfloat16")
    x = wide([x])[0]
    root = 4 * u * np.sqrt((x**4).sum(axis=-1)) / (x * x).sum(axis=-1)
    np.testing.assert_allclose(bound.usual, abs(bound.exact) * (u + root)[:, None], rtol=2e-2)


@EACH
def test_numbers_that_vanish_where_they_are_written(name):
    """Each below the smallest of float16: recorded as zeros, but none to the engine."""
    exact, bound, shapes, _ = OPERATIONS[name]
    used = [np.full(shape, TINY["float16"] / 2, np.float32) for shape in shapes]
    recorded = [array.astype(np.float16) for array in used]
    assert not any(array.any() for array in recorded)
    y = exact(*wide(used))
    assert judge(y, bound(*recorded, dtype="float32", inputs="float16")).ratio <= 1


@EACH
def test_nothing_is_said_of_numbers_that_were_too_large_to_write(name):
    """Of what float16 has no numbers for, the engine had some."""
    exact, bound, shapes, _ = OPERATIONS[name]
    for which in range(len(shapes)):
        used = [np.full(shape, 0.5, np.float32) for shape in shapes]
        used[which].reshape(-1)[-1] = 7e4
        with np.errstate(all="ignore"):
            recorded = [array.astype(np.float16) for array in used]
            allowed = bound(*recorded, dtype="float32", inputs="float16")
            assert allowed.ratio(exact(*wide(used))).max() <= 1
        assert np.isinf(allowed.limit).any()


@EACH
def test_formats_that_hold_the_sums_lose_nothing(rng, name):
    _, bound, shapes, _ = OPERATIONS[name]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    for form in ("float32", "float64"):
        np.testing.assert_array_equal(bound(*arrays, inputs=form).limit, bound(*arrays).limit)
        np.testing.assert_array_equal(bound(*arrays, inputs=form).usual, bound(*arrays).usual)
    with pytest.raises(ValueError, match=r"inputs: expected one of .*, got 'x'"):
        bound(*arrays, inputs="x")


def test_weights_are_what_they_are(rng):
    """Not written out by the engine, and so not rounded."""
    x = np.zeros((1, 64), DTYPES["bfloat16"])
    bound = linear_bound(x, MATRIX, BIAS, dtype="float32", inputs="bfloat16")
    assert (bound.limit <= 2.0**-24 * 66 * abs(BIAS)).all()
    none = linear_bound(x, np.zeros_like(MATRIX), dtype="float32", inputs="bfloat16")
    assert not none.limit.any()
    norm = rms_norm_bound(x, np.zeros(64, np.float32), eps=1e-5, dtype="float32", inputs="bfloat16")
    assert not norm.limit.any()


def test_silu_beside_its_least_value():
    """It falls up to -1.278 and rises from there: around it an input moves it little."""
    u, up = 2.0**-8 / (1 - 2.0**-8), np.ones(1, np.float32)
    for g in (-1.5, -1.3, -1.28125, -1.27, -1.25, -4.0, 9.0):
        gate = np.array([g], np.float32)
        near = np.linspace(g * (1 - u), g * (1 + u), 1001)
        silu, at = near / (1 + np.exp(-near)), g / (1 + np.exp(-g))
        moved = abs(silu - at).max()
        stated = moved + u * (abs(at) + moved)  # by the gate, and by up
        limit = swiglu_bound(gate, up, inputs="bfloat16").limit[0]
        assert stated <= limit <= stated + 2.0**-19 * abs(g)


def test_residual_that_flushes():
    """Both numbers below the smallest normal one, or their sum."""
    tiny = np.float32(2.0**-127)
    for a, b in ((tiny, tiny), (3 * tiny, -2 * tiny)):
        a, b, zero = np.float32([a]), np.float32([b]), np.zeros(1, np.float32)
        assert judge(zero, residual_bound(a, b)).verdict == "FAIL"
        assert judge(zero, residual_bound(a, b, flushes=True)).verdict == "PASS"
    assert residual_bound(a, -a, flushes=True).limit[0] == 0
