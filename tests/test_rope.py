"""RoPE: angles against closed forms and exact arithmetic, every scaling, and what turning keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import apply_rope, inv_freq, rope_table
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.rope import attention_factor
from llama_layers.testing import assert_same_bits
from tests.support import decoder_oracle
from tests.support.random_models import GQA

pytestmark = pytest.mark.usefixtures("bodies")

# 2 pi to 60 digits.
TWO_PI = Fraction("6.283185307179586476925286766559005768394338798750211641949889")


def config_of(head_dim=8, theta=10000.0, scaling=None, context=64):
    return replace(
        GQA,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=context,
    )


LIKE = np.zeros(0)
SCALINGS = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3, other band": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 16.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn, context of the config": {"rope_type": "yarn", "factor": 16.0},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.4},
    "yarn, half of mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    "yarn, factor 1": {"rope_type": "yarn", "factor": 1.0},
    "yarn, no ramp": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_the_papers(name):
    for length, theta, head_dim in product((None, 50, 64, 1000), (1e4, 5e5), (2, 8, 64)):
        config = config_of(head_dim, theta, SCALINGS[name])
        expected, factor = decoder_oracle.frequencies(config, length)
        # A power and some ten products, each rounded; the ramps of YaRN subtract logarithms.
        np.testing.assert_allclose(inv_freq(config, length=length), expected, rtol=1e-11)
        assert attention_factor(config) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize("name", SCALINGS)
def test_table_is_of_these_frequencies(name):
    """Beyond the trained context, with the factor on both; "dynamic" looks at the last position."""
    config = config_of(16, 10000.0, SCALINGS[name])
    positions = np.array([[0, 5, 70], [3, 99, 2]])
    cos, sin = rope_table(positions, config, like=LIKE)
    speeds, factor = decoder_oracle.frequencies(config, 100)
    assert cos.shape == sin.shape == (2, 3, 8)
    for place in np.ndindex(2, 3):
        for i, speed in enumerate(speeds):
            phase = int(positions[place]) * speed
            assert cos[(*place, i)] == pytest.approx(factor * math.cos(phase), abs=1e-9)
            assert sin[(*place, i)] == pytest.approx(factor * math.sin(phase), abs=1e-9)


def test_published_frequencies_of_llama3_1():
    """Some of 64, from the formula by hand: the first is kept, the last divided by 8."""
    config = config_of(128, 500000.0, SCALINGS["llama3"])
    speeds = inv_freq(config)
    assert speeds[0] == 1.0
    assert speeds[63] == pytest.approx(500000.0 ** (-126 / 128) / 8, rel=1e-14)
    kept = [i for i in range(64) if 2 * math.pi * 500000.0 ** (2 * i / 128) < 8192 / 4]
    scaled = [i for i in range(64) if 2 * math.pi * 500000.0 ** (2 * i / 128) > 8192]
    plain = 500000.0 ** (-2 * np.arange(64) / 128)
    np.testing.assert_allclose(speeds[kept], plain[kept], rtol=1e-14)
    np.testing.assert_allclose(speeds[scaled], plain[scaled] / 8, rtol=1e-14)
    assert len(kept) + len(scaled) < 64


def exact_cosine_and_sine(position, theta, i, head_dim):
    """From 50 digits: the phase as a decimal, reduced by exact multiples of 2 pi."""
    with localcontext(prec=50):
        exponent = Decimal(2 * i) / Decimal(head_dim)
        phase = Decimal(position) * (-exponent * Decimal(theta).ln()).exp()
    reduced = Fraction(phase) % TWO_PI
    return math.cos(reduced), math.sin(reduced)


@pytest.mark.parametrize("theta", [10000, 500000])
@pytest.mark.parametrize("position", [1, 8191, 131071])
def test_phases_are_exact_to_float32(theta, position):
    """In float32 the phases would be off by 3e-4 at position 8191, and 6e-3 at 131071."""
    config = config_of(64, float(theta))
    like = np.zeros(0, np.float32)
    cos, sin = rope_table(np.array([position]), config, like=like)
    assert cos.dtype == sin.dtype == np.float32
    for i in range(32):
        exact = exact_cosine_and_sine(position, theta, i, 64)
        for computed, value in zip((cos[0, i], sin[0, i]), exact, strict=True):
            # One rounding to float32, and the phase in float64: position times 2 roundings.
            assert abs(float(computed) - value) <= 2.0**-25 + position * 2.0**-51


@given(
    head_dim=st.sampled_from([2, 4, 10]),
    theta=st.sampled_from([100.0, 10000.0]),
    position=st.integers(0, 500),
)
def test_basis_vectors(backend, head_dim, theta, position):
    """e_i turns into cos e_i + sin e_{i + D/2}, and that one into cos e_{i + D/2} - sin e_i."""
    config = config_of(head_dim, theta)
    half = head_dim // 2
    x = backend.array(np.eye(head_dim, dtype=np.float32).reshape(1, 1, head_dim, head_dim))
    positions = backend.array(np.array([position]))
    y = apply_rope(x, *rope_table(positions, config, like=x))
    assert y.dtype == x.dtype
    assert backend.holds(y)
    expected = np.zeros((head_dim, head_dim))
    for i in range(half):
        phase = position * theta ** (-2 * i / head_dim)
        expected[i, i] = expected[i + half, i + half] = math.cos(phase)
        expected[i, i + half], expected[i + half, i] = math.sin(phase), -math.sin(phase)
    np.testing.assert_allclose(to_numpy(y)[0, 0], expected, rtol=0, atol=2.0**-23)


def turned(x, positions, layout="half", config=None):
    config = config or config_of(x.shape[3])
    return apply_rope(x, *rope_table(positions, config, like=x), layout=layout)


def some_heads(seed, shape=(2, 5, 3, 8)):
    return np.random.default_rng(seed).standard_normal(shape)


LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])
SEEDS = st.integers(0, 2**32 - 1)


@LAYOUTS
@given(seed=SEEDS)
def test_position_0_changes_no_bit(layout, seed):
    x = some_heads(seed)
    assert_same_bits(turned(x, np.zeros(5, int), layout), x)


@LAYOUTS
@given(seed=SEEDS)
def test_turning_back(layout, seed):
    x = some_heads(seed)
    positions = np.random.default_rng(seed).integers(1000, size=5)
    cos, sin = rope_table(positions, config_of(), like=x)
    there = apply_rope(x, cos, sin, layout=layout)
    np.testing.assert_allclose(apply_rope(there, cos, -sin, layout=layout), x, atol=1e-14)
    assert np.abs(there - x).max() > 0.1


@LAYOUTS
@given(seed=SEEDS)
def test_norms_of_pairs_are_kept(layout, seed):
    x = some_heads(seed)
    y = turned(x, np.random.default_rng(seed).integers(1000, size=5), layout)
    norms = (
        (lambda z: np.hypot(z[..., :4], z[..., 4:]))
        if layout == "half"
        else (lambda z: np.hypot(z[..., ::2], z[..., 1::2]))
    )
    np.testing.assert_allclose(norms(y), norms(x), rtol=1e-14)


@LAYOUTS
@given(seed=SEEDS, distance=st.integers(-50, 50))
def test_scores_depend_on_the_distance_only(layout, seed, distance):
    q, k = some_heads(seed, (2, 1, 1, 1, 8))
    starts = np.random.default_rng(seed).integers(50, 2000, size=3)
    scores = [
        float(
            np.sum(turned(q, np.array([s]), layout) * turned(k, np.array([s + distance]), layout))
        )
        for s in starts
    ]
    # Phases up to 2050, each with the roundings of a product.
    np.testing.assert_allclose(scores, scores[0], atol=1e-10)


@given(seed=SEEDS)
def test_half_is_interleaved_permuted(seed):
    x = some_heads(seed)
    positions = np.arange(5) * 7
    shuffled = np.empty_like(x)
    shuffled[..., 0::2], shuffled[..., 1::2] = x[..., :4], x[..., 4:]
    y = turned(shuffled, positions, "interleaved")
    assert_same_bits(np.concatenate([y[..., 0::2], y[..., 1::2]], axis=-1), turned(x, positions))


@LAYOUTS
def test_positions_of_each_row(layout, rng):
    x = some_heads(1)
    positions = rng.integers(1000, size=(2, 5))
    y = turned(x, positions, layout)
    for row in range(2):
        assert_same_bits(y[row], turned(x[row : row + 1], positions[row], layout)[0])


@LAYOUTS
def test_one_table_for_the_batch(layout, rng):
    x = some_heads(1)
    positions = rng.integers(1000, size=5)
    assert_same_bits(turned(x, positions[None], layout), turned(x, positions, layout))


@pytest.mark.parametrize("rows", [(), (1,), (2,)])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_memory_order_is_free(rows, layout, rng):
    x = rng.standard_normal((2, 5, 3, 8))
    cos, sin = rng.standard_normal((2, *rows, 5, 4))
    expected = apply_rope(x, cos, sin, layout=layout)
    beside = x.reshape(10, 24).copy(order="F").reshape(x.shape)
    for other in (beside, np.asfortranarray(x), x[:, ::-1].copy()[:, ::-1]):
        other.flags.writeable = False
        assert_same_bits(apply_rope(other, cos, sin, layout=layout), expected)


def test_interleaved_on_a_basis_vector():
    """The paper's own: channel 2i turns into 2i + 1."""
    x = np.zeros((1, 1, 1, 4))
    x[..., 2] = 1.0
    y = turned(x, np.array([3]), "interleaved", config_of(4, 100.0))
    np.testing.assert_allclose(y[0, 0, 0], [0, 0, math.cos(0.3), math.sin(0.3)], atol=1e-15)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_formats_are_turned_in_float32_and_rounded_once(dtype):
    wide = some_heads(3).astype(dtype).astype(np.float32)
    expected = turned(wide, np.arange(5)).astype(dtype)
    assert_same_bits(turned(wide.astype(dtype), np.arange(5)), expected)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64"])
def test_any_integer_position(dtype):
    like = np.zeros(0)
    table = rope_table(np.arange(100), config_of(), like=like)
    own = rope_table(np.arange(100, dtype=dtype), config_of(), like=like)
    assert_same_bits(own[0], table[0])
    assert_same_bits(own[1], table[1])


def test_no_positions():
    cos, sin = rope_table(np.zeros((2, 0), int), config_of(), like=LIKE)
    assert cos.shape == sin.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([0, 1], TypeError, "positions: expected an array"),
        (np.arange(2.0), TypeError, "positions: expected an integer dtype, got float64"),
        (np.array([True]), TypeError, "positions: expected an integer dtype, got bool"),
        (np.array(3), ValueError, r"positions: expected shape \[S\] or \[B, S\], got \[\]"),
        (np.zeros((1, 1, 1), int), ValueError, r"positions: .* got \[1, 1, 1\]"),
        (np.array([4, -2]), ValueError, "positions: expected zero or more, got -2"),
    ],
)
def test_table_refuses(positions, error, message):
    with pytest.raises(error, match=message):
        rope_table(positions, config_of(), like=LIKE)
    with pytest.raises(TypeError, match="like: expected one of the dtypes"):
        rope_table(np.arange(2), config_of(), like=np.zeros(0, int))


X = np.zeros((2, 3, 1, 4))
ANGLES = np.zeros((3, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], ANGLES, ANGLES), {}, ValueError, r"x: expected shape \[B, S, heads, D\]"),
        ((X[..., :3], ANGLES, ANGLES), {}, ValueError, r"x: .* an even D, got \[2, 3, 1, 3\]"),
        ((X, ANGLES[:2], ANGLES), {}, ValueError, r"cos: .*\[3, 2\] or \[2, 3, 2\].*got \[2, 2\]"),
        ((X, ANGLES, ANGLES.T), {}, ValueError, r"sin: expected shape .* got \[2, 3\]"),
        ((X, ANGLES, np.stack([ANGLES] * 3)), {}, ValueError, r"sin: .* got \[3, 3, 2\]"),
        ((X, ANGLES, ANGLES[None, :2]), {}, ValueError, r"sin: .* got \[1, 2, 2\]"),
        (
            (X, ANGLES.astype(np.float32), ANGLES),
            {},
            TypeError,
            "cos: expected float64 for x, got float32",
        ),
        ((X.astype(int), ANGLES, ANGLES), {}, TypeError, "x: expected one of the dtypes"),
        ((X, ANGLES.tolist(), ANGLES), {}, TypeError, "cos: expected an array"),
        ((X, ANGLES, ANGLES), {"layout": "meta"}, ValueError, "layout: .*interleaved', got 'meta'"),
    ],
)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        apply_rope(*arguments, **options)


@pytest.mark.parametrize("call", [inv_freq, attention_factor])
def test_configs_of_another_kind(call):
    with pytest.raises(TypeError, match="config: expected a LlamaConfig, got int"):
        call(3)


@pytest.mark.parametrize("length", [0, -3, 2.5, "x", True])
def test_lengths_are_counts(length):
    with pytest.raises(ValueError, match="length: expected a positive integer, got"):
        inv_freq(config_of(), length=length)
