"""Attention with sinks: numbers that join the scores of a head and weigh no value."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from llama_layers import Mask, attention
from llama_layers.verify import (
    attention_bound,
    probabilities_bound,
    scores_bound,
    softmax_bound,
)
from tests.support import decoder_oracle, engines

RNG = np.random.default_rng(3)
Q = RNG.standard_normal((2, 5, 4, 6))
K, V = RNG.standard_normal((2, 2, 5, 2, 6))
SINKS = np.array([0.5, -2.0, 30.0, 0.0])
SEEN = [[list(range(max(0, s - 2), s + 1)) for s in range(5)]] * 2
PLACES = np.arange(5)


def test_like_naive_loops():
    expected = decoder_oracle.attention(Q, K, V, SEEN, sinks=SINKS)
    mask = Mask(PLACES, PLACES, window=3)
    assert np.allclose(attention(Q, K, V, mask=mask, sinks=SINKS), expected, rtol=1e-13, atol=1e-15)
    strict = [array_api_strict.asarray(x) for x in (Q, K, V, SINKS)]
    given = array_api_strict.asarray(np.tri(5, dtype=bool) & ~np.tri(5, k=-3, dtype=bool))
    found = attention(*strict[:3], mask=given, sinks=strict[3])
    assert np.allclose(np.asarray(found), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_within_the_bound(dtype):
    q, k, v, sinks = (x.astype(dtype) for x in (Q, K, V, SINKS))
    y, mask = attention(q, k, v, sinks=sinks, softcap=3.0), np.ones((5, 5), bool)
    bound = attention_bound(q, k, v, mask=mask, sinks=sinks, softcap=3.0)
    assert (bound.ratio(y) <= 1).all()
    assert not (bound.ratio(attention(q, k, v, softcap=3.0)) <= 1).any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_parts_are_within_their_bounds(dtype):
    """Capped scores, and probabilities that a sink has a share of."""
    q, k, sinks = (x.astype(dtype) for x in (Q, K, SINKS))
    plain = engines.scores(q, k, 0.4)
    capped = (3 * np.tanh(plain / 3)).astype(dtype)
    joined = np.broadcast_to(sinks[:, None, None], (2, 4, 5, 1))
    e = np.exp(np.concatenate([capped, joined], axis=3).astype(np.float32))
    p = (e / e.sum(axis=-1, keepdims=True))[..., :-1].astype(dtype)
    bound = scores_bound(q, k, scale=0.4, softcap=3.0)
    assert (bound.ratio(capped) <= 1).all()
    assert np.median(bound.ratio(plain)) > 1
    for bound in (
        softmax_bound(capped, sinks=sinks),
        probabilities_bound(q, k, scale=0.4, softcap=3.0, sinks=sinks, scores=np.dtype(dtype).name),
    ):
        assert (bound.ratio(p) <= 1).all()
        assert np.median(bound.ratio(p / p.sum(axis=-1, keepdims=True))) > 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sinks": SINKS[:3]}, ValueError, r"^sinks: expected shape \[4\], got \[3\]"),
        ({"sinks": np.arange(4)}, TypeError, "^sinks: expected one of the dtypes"),
        ({"softcap": 0.0}, ValueError, "^softcap: expected a positive number, got 0.0"),
        ({"softcap": "x"}, TypeError, "^softcap: expected a"),
    ],
)
def test_bounds_refuse(options, error, message):
    for bound in (lambda: attention_bound(Q, K, V, **options),
                  lambda: probabilities_bound(Q, K, scale=1.0, **options)):  # fmt: skip
        with pytest.raises(error, match=message):
            bound()


def test_a_sink_of_minus_infinity_is_none():
    none = np.full(4, -np.inf)
    assert np.array_equal(attention(Q, K, V, sinks=none), attention(Q, K, V))


def test_a_query_that_may_attend_to_no_key_gets_zeros():
    mask = np.zeros((5, 5), bool)
    mask[1:] = True
    y = attention(Q, K, V, mask=mask, sinks=SINKS)
    assert not y[:, 0].any()
    assert np.isfinite(y).all()


def test_scores_beyond_the_range_of_exponentials():
    y = attention(300 * Q, K, V, sinks=SINKS + 1000)
    assert np.isfinite(y).all()


def test_sums_may_be_wider_than_weights():
    narrow = SINKS.astype(ml_dtypes.bfloat16)
    q, k, v = (x.astype(np.float32) for x in (Q, K, V))
    wide = attention(q, k, v, sinks=narrow.astype(np.float32))
    assert np.array_equal(attention(q, k, v, sinks=narrow), wide)


@pytest.mark.parametrize(
    ("sinks", "error", "message"),
    [
        (SINKS[:3], ValueError, r"^sinks: expected shape \[4\], got \[3\]$"),
        (SINKS[None], ValueError, r"^sinks: expected shape \[4\], got \[1, 4\]$"),
        (np.arange(4), TypeError, "^sinks: expected .*float"),
        ([0.0] * 4, TypeError, "^sinks: expected an array"),
    ],
)
def test_refuses(sinks, error, message):
    with pytest.raises(error, match=message):
        attention(Q, K, V, sinks=sinks)
