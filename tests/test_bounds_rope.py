"""The bound of RoPE against decimals, against the roundings of engines, and against mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import LlamaConfig, RopeScaling, apply_rope, inv_freq, rope_table
from llama_layers.testing import arrays, configs
from llama_layers.verify import judge, rope_bound
from llama_layers.verify.rotation import _relative_errors
from tests.support import decimals, engines
from tests.support.engines import DTYPES

CONFIG = LlamaConfig.smollm2_135m()  # D = 64, theta = 100000
PLACES = np.array([0, 1, 7, 500, 8190])
NARROW = pytest.mark.parametrize("dtype", engines.NARROW)


def queries(rng, dtype, heads=3, config=CONFIG, places=PLACES):
    x = rng.standard_normal((1, len(places), heads, config.head_dim))
    return x.astype(DTYPES[dtype])


def turned(x, places, config=CONFIG, **options):
    table = rope_table(places, config, like=x)
    return apply_rope(x, *table, rotary_dim=config.rotary_dim, **options)


def exact_turn(x, places, config, layout):
    """In decimals, for x [1, S, heads, D] and frequencies that are not scaled."""
    numbers, half = decimals.decimals(x), config.head_dim // 2
    y = np.empty(x.shape, object)
    with localcontext(decimals.CONTEXT):
        theta = Decimal(config.rope_theta)
        for s, i in np.ndindex(len(places), half):
            frequency = theta ** (-Decimal(2 * i) / config.head_dim)
            c, n = decimals.cosine_and_sine(int(places[s]) * frequency)
            first, second = (i, i + half) if layout == "half" else (2 * i, 2 * i + 1)
            a, b = numbers[0, s, :, first], numbers[0, s, :, second]
            y[0, s, :, first], y[0, s, :, second] = a * c - b * n, b * c + a * n
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_true_error_is_within_the_limit(rng, dtype, layout):
    config = replace(CONFIG, head_dim=8, num_key_value_heads=3)
    places = np.array([0, 1, 100, 8191, 131071])
    x = queries(rng, dtype, 2, config, places)
    exact = exact_turn(x, places, config, layout)
    bound = rope_bound(x, places, config, layout=layout)
    assert (decimals.errors(turned(x, places, config, layout=layout), exact) <= bound.limit).all()
    assert (decimals.errors(bound.exact, exact) <= 1e-9).all()
    other = "half" if layout == "interleaved" else "interleaved"
    assert judge(turned(x, places, config, layout=other), bound).ratio > 50


@given(
    config=configs(),
    places=st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
    layout=st.sampled_from(["half", "interleaved"]),
    dtype=st.sampled_from(sorted(DTYPES)),
    data=st.data(),
)
def test_our_own_is_within_the_limit(config, places, layout, dtype, data):
    """With every scaling, any numbers and any positions."""
    shape = (1, len(places), 2, config.head_dim)
    x = data.draw(arrays(shape, dtype=dtype, max_magnitude=np.inf))
    places = np.array(places)
    with np.errstate(all="ignore"):
        y = turned(x, places, config, layout=layout)
        bound = rope_bound(x, places, config, layout=layout)
    assert bound.ratio(y).max() <= 1
    assert (bound.usual <= bound.limit).all()


@pytest.mark.parametrize("power", [1, 2])
def test_limit_with_rounded_table_products_and_phases(rng, power):
    """Of one pair by hand: D = 2 turns by 1 radian, and its phase errs by 12 roundoffs."""
    config = replace(CONFIG, head_dim=2)
    x, place, u = np.array([[[[1.5, 0.5]]]], np.float32), np.array([3 * power]), 2.0**-24
    c, n = math.cos(3.0 * power), math.sin(3.0 * power)
    magnitude = 1.5 * abs(c) + 0.5 * abs(n)

    def limit(**options):
        return rope_bound(x, place, config, **options).limit[0, 0, 0, 0]

    plain = 4 * u * magnitude
    assert limit() == pytest.approx(plain, rel=1e-6)
    assert limit(phases="float32") == pytest.approx(plain + 12 * u * 3 * power * 2, rel=1e-5)
    assert limit(rope_table="float16") == pytest.approx(plain + 2.0**-11 * magnitude, rel=1e-3)
    y = 1.5 * c - 0.5 * n
    sums = plain + 2 * 2.0**-11 * magnitude
    assert limit(rope_arithmetic="float16") == pytest.approx(sums, rel=2e-3)
    # Rounded into the result's format once more only where that is another.
    into = limit(rope_arithmetic="float16", dtype="float16")
    assert into == pytest.approx(sums, rel=2e-3)
    assert limit(dtype="float16") == pytest.approx(plain + 2.0**-11 * abs(y), rel=1e-3)
    assert limit(rope_table="float32", rope_arithmetic="float64") == limit()


def test_nothing_is_allowed_at_position_zero(rng):
    x = queries(rng, "float32", places=[0])
    bound = rope_bound(x, np.array([0]), CONFIG, phases="float32")
    assert (bound.limit == 0).all()
    assert judge(x, bound).verdict == "PASS"
    yarn = replace(CONFIG, rope_scaling=RopeScaling("yarn", factor=4.0))
    assert (rope_bound(x, np.array([0]), yarn).limit > 0).all()  # the table has a factor


def test_float32_phases_are_told_apart(rng):
    """transformers' and llama.cpp's: beyond the limit without the flag, well within with it."""
    x = queries(rng, "float32")
    for phases in (engines.phases_in_float32, engines.phases_one_after_the_other):
        y = engines.rope(x[0], phases(PLACES, CONFIG))[None]
        assert judge(y, rope_bound(x, PLACES, CONFIG)).ratio > 50
        assert judge(y, rope_bound(x, PLACES, CONFIG, phases="float32")).verdict == "PASS"
        assert judge(y[:, :1], rope_bound(x[:, :1], PLACES[:1], CONFIG)).ratio == 0


SCALINGS = [
    RopeScaling("linear", factor=3.0),
    RopeScaling("dynamic", factor=3.0),
    RopeScaling("yarn", factor=7.0),
    RopeScaling("yarn", factor=7.0, truncate=False),
    RopeScaling(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.rope_type}-{s.truncate}")
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_scaled_frequencies_in_float32(rng, scaling, theta):
    """Every operation of the scaled frequencies rounded to float32."""
    config = replace(CONFIG, head_dim=128, rope_theta=theta, rope_scaling=scaling)
    places = np.array([0, 3, 4095, 8191, 30000])
    x = queries(rng, "float32", 1, config, places)
    bound = rope_bound(x, places, config, phases="float32")
    phases = places.astype(np.float32)[:, None] * frequencies_in_float32(config, 30001)
    assert phases.dtype == np.float32
    factor = 0.1 * math.log(7.0) + 1 if scaling.rope_type == "yarn" else 1.0
    y = engines.rope(x[0], phases)[None] * np.float32(factor)
    assert judge(y, bound).ratio <= 1
    assert judge(y, rope_bound(x, places, config)).ratio > 1
    plain = engines.rope(x[0], engines.phases_in_float32(places, config))[None]
    assert judge(plain * np.float32(factor), bound).ratio > 100  # the scaling forgotten


def frequencies_in_float32(config, length):
    f = np.float32
    scaling, dim, trained = config.rope_scaling, config.head_dim, config.max_position_embeddings
    theta, factor = f(config.rope_theta), f(scaling.factor)
    exponents = np.arange(0, dim, 2).astype(f) / f(dim)
    if scaling.rope_type == "dynamic":
        stretch = factor * f(length) / f(trained) - (factor - f(1))
        theta = theta * stretch ** f(dim / (dim - 2))
    plain = f(1) / theta**exponents
    if scaling.rope_type == "dynamic":
        return plain
    if scaling.rope_type == "linear":
        return plain / factor
    if scaling.rope_type == "llama3":
        turns = f(scaling.original_max_position_embeddings) / (f(2 * math.pi) / plain)
        weight = (turns - f(scaling.low_freq_factor)) / f(
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        kept = np.clip(weight, f(0), f(1))
        return (f(1) - kept) * plain / factor + kept * plain
    low, high = (
        f(dim) * np.log(f(trained) / (f(t) * f(2 * math.pi))) / (f(2) * np.log(theta))
        for t in (32, 1)
    )
    if scaling.truncate is not False:
        low, high = np.floor(low), np.ceil(high)
    ramp = np.clip((np.arange(dim // 2).astype(f) - low) / (high - low), f(0), f(1))
    return plain / factor * ramp + plain * (f(1) - ramp)


@NARROW
def test_a_rounded_table_and_products_are_told_apart(rng, dtype):
    """transformers rounds cosines, sines, both products and their sum to the dtype."""
    x = queries(rng, dtype, 20)
    phases = PLACES[:, None] * CONFIG.rope_theta ** (-np.arange(32) / 32)
    table = engines.rope(x[0], phases, table=dtype)[None]
    both = engines.rope(x[0], phases, table=dtype, arithmetic=dtype)[None]
    allowed = {
        "none": rope_bound(x, PLACES, CONFIG),
        "table": rope_bound(x, PLACES, CONFIG, rope_table=dtype),
        "both": rope_bound(x, PLACES, CONFIG, rope_table=dtype, rope_arithmetic=dtype),
    }
    verdicts = {
        name: (judge(table, bound).verdict, judge(both, bound).verdict)
        for name, bound in allowed.items()
    }
    assert verdicts == {
        "none": ("FAIL", "FAIL"),
        "table": ("PASS", "FAIL"),
        "both": ("PASS", "PASS"),
    }
    assert judge(both, allowed["both"]).ratio > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mistakes_fail(rng, dtype):
    x = queries(rng, dtype)
    bound = rope_bound(x, PLACES, CONFIG, phases="float32")
    x32 = x.astype(np.float32)
    backwards = turned(x32[..., ::-1], PLACES)[..., ::-1]
    theta = turned(x32, PLACES, replace(CONFIG, rope_theta=1e4))
    wrong = {
        "position off by one": turned(x32, PLACES + 1),
        "theta": theta,
        "not turned": x32,
        "backwards": backwards,
        "one pair": np.where(np.arange(64) % 32 == 5, x32, turned(x32, PLACES)),
    }
    for name, y in wrong.items():
        assert judge(y.astype(x.dtype), bound).ratio > 20, name


def test_positions_of_each_sequence_and_the_largest_of_all(rng):
    """[B, S], and "dynamic" frequencies by the largest position of the whole call."""
    config = replace(
        CONFIG,
        max_position_embeddings=8,
        rope_scaling=RopeScaling("dynamic", factor=2.0),
    )
    places = np.array([[0, 1, 2], [30, 31, 40]])
    x = rng.standard_normal((2, 3, 2, 64)).astype(np.float32)
    y = turned(x, places, config)
    assert judge(y, rope_bound(x, places, config)).verdict == "PASS"
    assert judge(y[:1], rope_bound(x[:1], places[:1], config)).verdict == "FAIL"


def test_what_is_not_finite(rng):
    x = queries(rng, "float32", 1)
    x[0, 1, 0, 3], x[0, 2, 0, 5] = np.inf, np.nan
    x[0, 3] = 3e38
    with np.errstate(all="ignore"):
        y = turned(x, PLACES)
        bound = rope_bound(x, PLACES, CONFIG)
    assert bound.ratio(y).max() == pytest.approx(bound.ratio(y)[np.isfinite(bound.limit)].max())
    assert np.isinf(bound.limit[0, 3]).any()
    assert bound.ratio(np.zeros_like(y))[0, 2, 0, 5] == np.inf
    with np.errstate(all="ignore"):
        small = rope_bound(x, PLACES, CONFIG, dtype="float16")
        middle = rope_bound(x, PLACES, CONFIG, rope_arithmetic="float16")
    assert np.isinf(small.limit[0, 3]).all()
    assert np.isinf(middle.limit[0, 3]).all()


def test_flushing_engines():
    x = np.full((1, 1, 1, 64), 2.0**-128, np.float32)
    flushed, place = np.zeros_like(x), np.array([1])
    assert (rope_bound(x, place, CONFIG).ratio(flushed) > 1).any()
    assert (rope_bound(x, place, CONFIG, flushes=True).ratio(flushed) <= 1).all()


def test_no_positions():
    x = np.zeros((1, 0, 2, 64), np.float32)
    assert rope_bound(x, np.arange(0), CONFIG).limit.shape == x.shape


X = np.zeros((1, 2, 3, 64), np.float32)
P = np.arange(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rope_bound(X[..., :32], P, CONFIG), ValueError, r"x: .* heads, 64\], got .*32\]"),
        (lambda: rope_bound(X[0], P, CONFIG), ValueError, r"x: .*, got \[2, 3, 64\]"),
        (lambda: rope_bound(X, P * 1.0, CONFIG), TypeError, "positions: .*, got float64"),
        (lambda: rope_bound(X, [0, 1], CONFIG), TypeError, "positions: .* array .*, got list"),
        (lambda: rope_bound(X, P[:1], CONFIG), ValueError, r"positions: .*\[1, 2\], got \[1\]"),
        (lambda: rope_bound(X, P, CONFIG, layout="x"), ValueError, "layout: .*, got 'x'"),
        (lambda: rope_bound(X, P, CONFIG, phases="x"), ValueError, "phases: .*, got 'x'"),
        (lambda: rope_bound(X, P, CONFIG, rope_table="x"), ValueError, "rope_table: .*, got 'x'"),
        (
            lambda: rope_bound(X, P, CONFIG, rope_arithmetic="x"),
            ValueError,
            "rope_arithmetic: .*, got 'x'",
        ),
        (lambda: rope_bound(P, P, CONFIG), TypeError, "x: expected one of the dtypes"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_error_of_the_ramp_counts_as_often_as_it_moves_the_frequency():
    """The slowest pair turns at f = plain / s; by the weight w of the ramp, d ln f / dw = 1 - s."""
    found = {}
    for s in (2.0, 4.0, 8.0):
        scaling = RopeScaling("yarn", factor=s, original_max_position_embeddings=64)
        config = replace(CONFIG, rope_scaling=scaling)
        frequencies = inv_freq(config)
        assert frequencies[-1] == pytest.approx(100000 ** (-62 / 64) / s)
        found[s] = _relative_errors(config, frequencies, None, 1.0)[-1]
    assert found[8.0] > found[4.0]
    assert found[8.0] - found[4.0] == pytest.approx(2 * (found[4.0] - found[2.0]))
