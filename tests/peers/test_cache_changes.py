"""Caches of torch and jax, cut, reordered, repeated and made longer; jax compiled too."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_layers import KVCache, forward
from llama_layers.arrays.transfer import from_numpy, to_numpy
from tests.support.cache_session import Session
from tests.support.random_models import CONFIGS, model_of, random_weights
from tests.test_forward import FLOAT32, assert_close

pytestmark = pytest.mark.peer

CLOSE = partial(assert_close, tolerance=FLOAT32)


@given(data=st.data())
def test_torch(data):
    session = Session(data, CLOSE, array=partial(from_numpy, xp=torch), dtype=np.float32)
    for _ in range(data.draw(st.integers(5, 20), label="steps")):
        session.step()


@settings(max_examples=2)  # jax compiles each operation again for each length
@given(data=st.data())
def test_jax(data):
    session = Session(data, CLOSE, array=partial(from_numpy, xp=jnp), dtype=np.float32)
    for _ in range(4):
        session.step()


@pytest.mark.parametrize(("kind", "rolling"), [("gqa", None), ("window", 3), ("window", None)])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled(kind, rolling, padded, rng):
    """One trace for all lengths and rows, which are traced too."""
    weights = random_weights(CONFIGS[kind], dtype=np.float32)
    model = model_of(CONFIGS[kind], weights, jnp.asarray)
    exact = model_of(CONFIGS[kind], {n: w.astype(np.float64) for n, w in weights.items()})
    traces = []

    def step(ids, cache, length, rows, mask):
        traces.append("step")
        logits, cache = forward(model, ids, cache=cache, attention_mask=mask)
        return logits, cache.truncate(length).take(rows)

    step = jax.jit(step)
    seen, keep = np.zeros((2, 0), int), np.zeros((2, 0), bool)
    cache = KVCache.create(model, 2, 8, rolling=rolling)
    for i, (length, rows) in enumerate([(2, [0, 1]), (3, [1, 0]), (5, [1, 1]), (7, [1, -2])]):
        ids = rng.integers(13, size=(2, 2))
        valid = np.array([[True, True], [i > 0, True]]) if padded else np.ones((2, 2), bool)
        given_mask = jnp.asarray(valid) if padded else None
        logits, cache = step(jnp.asarray(ids), cache, length, jnp.asarray(rows), given_mask)
        seen, keep = np.concatenate([seen, ids], axis=1), np.concatenate([keep, valid], axis=1)
        expected = forward(exact, seen, attention_mask=keep).logits[:, -2:]
        CLOSE(to_numpy(logits)[valid], expected[valid])
        seen, keep = seen[rows, :length], keep[rows, :length]
        assert int(cache.length) == length
        if padded:
            np.testing.assert_array_equal(to_numpy(cache.counts), keep.sum(axis=1))
    assert len(traces) == 1 + padded  # the first padding makes another cache
    longer = jax.jit(lambda cache: cache.repeat(2).grow(11))(cache)
    assert (longer.max_len, longer.keys[0].shape[0]) == (11, 4)
    logits = jax.jit(partial(forward, model))(jnp.asarray(np.full((4, 1), 3)), cache=longer).logits
    seen, keep = (np.repeat(a, 2, axis=0) for a in (seen, keep))
    seen, keep = (np.pad(a, ((0, 0), (0, 1)), constant_values=c) for a, c in ((seen, 3), (keep, 1)))
    CLOSE(logits, forward(exact, seen, attention_mask=keep).logits[:, -1:])


def test_what_a_compiler_cannot_notice(rng):
    """Rows out of range give NaN; a ring knows after compiling what it has lost."""
    config = CONFIGS["window"]
    model = model_of(config, random_weights(config, dtype=np.float32), jnp.asarray)
    cache = KVCache.create(model, 1, 20, rolling=3)
    step = jax.jit(lambda ids, cache: forward(model, ids, cache=cache).cache)
    for _ in range(7):
        cache = step(jnp.asarray([[1]]), cache)
    with pytest.raises(ValueError, match=r"length: expected at least 4, or 0, .* got 3"):
        cache.truncate(6).truncate(3)
    taken = jax.jit(lambda cache, rows: cache.take(rows))(cache, jnp.asarray([1, -2, -5, -1]))
    logits = to_numpy(forward(model, jnp.asarray([[1]] * 4), cache=taken).logits)
    assert np.isnan(logits[:3]).all()
    assert np.isfinite(logits[3]).all()
