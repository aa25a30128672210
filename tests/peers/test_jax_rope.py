"""The table of RoPE at positions that jax traces: as exact as NumPy's, far beyond the context."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_layers import LlamaConfig, apply_rope, rope_table
from llama_layers.verify import rope_bound
from tests.test_rope import SCALINGS, config_of, exact_cosine_and_sine

pytestmark = pytest.mark.peer

LIKE = np.zeros(0, np.float32)
# Near odd multiples of pi / 2, where cosines are tiny: 710 / 2 of the first pair, and others.
SMALL = [1, 11, 344, 355, 710, 51819, 52174, 103638, 104348, 312689, 416027, 833719]


@cache
def compiled(config: LlamaConfig) -> Any:
    return jax.jit(lambda places: rope_table(places, config, like=jnp.zeros(0, jnp.float32)))


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "dynamic"])
def test_error_stays_within_the_bound(name, rng):
    config = config_of(16, 500000.0, SCALINGS[name], context=64)
    far = rng.integers(0, 2**20, 300)
    places = np.concatenate([[0, 2**20 - 1], SMALL, np.arange(1020, 1030), far, far % 1024])
    cos, sin = map(np.asarray, compiled(config)(jnp.asarray(places)))
    # One of a pair is zero, so that nothing hides the error of a small cosine or sine.
    x = np.zeros((1, len(places), 2, 16), np.float32)
    x[:, :, 0, :8], x[:, :, 1, 8:] = 1, 1
    bound = rope_bound(x, places, config)
    assert bound.ratio(apply_rope(x, cos, sin)).max() <= 1
    own = rope_table(places, config, like=LIKE)
    differ = [np.mean(found != expected) for found, expected in zip((cos, sin), own, strict=True)]
    assert max(differ) < 0.01


@pytest.mark.parametrize("position", [0, 1, 1023, 1024, 8191, 131071, 2**20 - 1])
def test_tables_are_those_of_exact_phases(position):
    config = config_of(64, 10000.0)
    cos, sin = map(np.asarray, compiled(config)(jnp.asarray([position])))
    for i in range(32):
        for found, value in zip(
            (cos[0, i], sin[0, i]), exact_cosine_and_sine(position, 10000, i, 64), strict=True
        ):
            # A rounding to float32, and the phase in float64: position times 2 roundings.
            assert abs(float(found) - value) <= 2.0**-25 + position * 2.0**-51


def test_beyond_what_is_served_is_nan():
    config = config_of(8)
    places = jnp.asarray([0, -1, -(2**31), 2**20 - 1, 2**20, 2**31 - 1])
    for found in compiled(config)(places):
        assert np.isnan(found).all(axis=1).tolist() == [False, True, True, False, True, True]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_any_integer_position(dtype):
    config, places = config_of(8), np.arange(100).reshape(2, 50)
    expected = rope_table(places, config, like=LIKE)
    for found, own in zip(compiled(config)(jnp.asarray(places, dtype)), expected, strict=True):
        np.testing.assert_allclose(found, own, rtol=2.0**-23, atol=0)


def test_float64(rng):
    """Where jax has it, the phases are in float64, as NumPy's are, at any position."""
    config = config_of(16, 10000.0, SCALINGS["yarn"])
    with jax.enable_x64(True):
        places = np.append(rng.integers(0, 2**24, 50), -1)
        run = jax.jit(lambda p: rope_table(p, config, like=jnp.zeros(0)))
        found = run(jnp.asarray(places))
        expected = rope_table(places[:-1], config, like=np.zeros(0))
        for own, other in zip(found, expected, strict=True):
            assert own.dtype == np.float64
            # A phase up to 2**24 in float64: a last place of it is 2**-29.
            np.testing.assert_allclose(own[:-1], other, rtol=0, atol=2.0**-28)
            assert np.isnan(own[-1]).all()
