"""Queries, keys and values to bound attention for, and the terms of its bounds written out."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from llama_layers.testing import arrays
from tests.support import engines
from tests.support.engines import DTYPES

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


def gamma(n, u):
    return n * u / (1 - n * u)


def roundoffs(dtype):
    """Of the sums and, where it is another, of the result."""
    sums = ROUNDOFF["float64" if dtype == "float64" else "float32"]
    return sums, ROUNDOFF[dtype] if dtype in engines.NARROW else 0.0


def heads(rng, dtype, queries=24, keys=24, q_heads=6, kv_heads=2, width=64, size=1.5):
    """q, k and v as models have them: scores of a few units."""
    shapes = ((queries, q_heads), (keys, kv_heads), (keys, kv_heads))
    sizes = (size, size, 1.0)
    return tuple(
        (s * rng.standard_normal((1, *shape, width))).astype(DTYPES[dtype])
        for shape, s in zip(shapes, sizes, strict=True)
    )


def causal(queries, keys=None):
    keys = queries if keys is None else keys
    return np.tri(queries, keys, keys - queries, dtype=bool)


@st.composite
def problems(draw, dtype, max_magnitude=8.0):
    """Tiny q, k, v, a mask and a scale; one query, one key and multi-query heads among them."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    width = draw(st.sampled_from([1, 2, 4]))
    options = {"dtype": dtype, "max_magnitude": max_magnitude}
    q = draw(arrays((1, queries, kv_heads * group, width), **options))
    k = draw(arrays((1, keys, kv_heads, width), **options))
    v = draw(arrays((1, keys, kv_heads, width), **options))
    bits = draw(st.integers(0, 2 ** (queries * keys) - 1))
    mask = np.array([bits >> i & 1 for i in range(queries * keys)], bool).reshape(queries, keys)
    return q, k, v, mask, draw(st.sampled_from([1 / math.sqrt(width), 1.0, 0.3]))


def tf32(a):
    return ((a.view(np.uint32) + 0x1000) >> 13 << 13).view(np.float32)


def relative(*logarithms):
    """What factors whose logarithms are given make, less 1."""
    return math.expm1(sum(logarithms))


def stated_probabilities(a, alpha, mask, u, ulps=4.0, rescalings=0):
    """p, eta and r as the docstrings have them, of a row of scores that err by alpha."""
    seen = [t for t in range(len(a)) if mask[t]]
    most, worst = max(a[t] for t in seen), max(alpha[t] for t in seen)
    e = {t: math.exp(a[t] - most) for t in seen}
    p = {t: e[t] / sum(e.values()) for t in seen}
    rho = gamma((2 * ulps + 1) * rescalings, u)
    eta = {
        t: relative(
            alpha[t] + u * (abs(a[t] - most) + alpha[t] + 2 * worst),
            math.log1p(2 * u * ulps),
            math.log1p(rho),
        )
        for t in seen
    }
    return p, eta, sum(p[t] * eta[t] for t in seen)
