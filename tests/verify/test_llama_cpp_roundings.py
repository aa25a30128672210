"""Where llama.cpp rounds: within the bounds that say so, and without them not."""

from __future__ import annotations

import numpy as np

from llama_layers.verify import attention_bound, geglu_bound
from llama_layers.verify.operations import Logits
from llama_layers.verify.profiles import Rounding
from tests.support import decoder_oracle


def in_float16(array):
    return array.astype(np.float16).astype(np.float64)


def test_logits_times_a_reciprocal_are_within_the_bound(rng):
    y = rng.standard_normal((1, 20, 400)).astype(np.float32)
    times = y * (np.float32(1) / np.float32(6))
    assert (times != y / np.float32(6)).any()
    bound = Logits(y, 6.0).bound(Rounding("float32", "float32"))
    assert bound.ratio(times).max() <= 1
    assert bound.ratio(times * np.float32(1 + 2.0**-22)).max() > 1


def test_gelu_from_a_table(rng):
    gate, up = rng.standard_normal((2, 3, 500)).astype(np.float32) * 3
    gelu = np.vectorize(decoder_oracle.gelu)
    y = np.float32(in_float16(gelu(in_float16(gate))) * up)
    bound = geglu_bound(gate, up, profile="llama.cpp")
    assert bound.ratio(y).max() <= 1
    assert geglu_bound(gate, up).ratio(y).max() > 100
    narrower = in_float16(gelu(gate * (1 + 2.0**-9))) * up
    assert bound.ratio(narrower).max() > 1


def attended(q, k, v):
    """In float64, of scaled queries."""
    scores = np.einsum("bshd,bthd->bhst", q, k)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)


def test_queries_scaled_before_they_are_rounded(rng):
    """Heads of 96, as in Phi-3: the scale is not a power of two."""
    q, k, v = rng.standard_normal((3, 1, 30, 2, 96)).astype(np.float32) * 2
    scale = 96**-0.5
    y = np.float32(attended(in_float16(q * scale), in_float16(k), in_float16(v)))
    scaled = attention_bound(q, k, v, scale=scale, profile="llama.cpp with scaled queries")
    assert scaled.ratio(y).max() <= 1
    assert attention_bound(q, k, v, scale=scale, profile="llama.cpp").ratio(y).max() > 1
    # Rounded to a format that is narrower by three digits, they are not within it.
    narrow = np.float32(q * scale).view(np.uint32) & np.uint32(0xFFFF0000)
    y = attended(narrow.view(np.float32).astype(np.float64), in_float16(k), in_float16(v))
    assert scaled.ratio(y).max() > 1


def test_a_scale_that_is_a_power_of_two(rng):
    """Queries are the same, scaled before they are rounded or after."""
    q, k, v = rng.standard_normal((3, 1, 30, 2, 64)).astype(np.float32)
    for_both = [
        attention_bound(q, k, v, scale=0.125, profile=profile)
        for profile in ("llama.cpp", "llama.cpp with scaled queries")
    ]
    np.testing.assert_array_equal(for_both[0].limit, for_both[1].limit)
