"""Tracked numbers against exact arithmetic, and formulas that no operation has."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers.testing import arrays
from llama_layers.verify import RoundingProfile, judge
from llama_layers.verify.operations import Attention, Gate, Linear, Norm, Softmax
from llama_layers.verify.profiles import PROFILES, Rounding
from llama_layers.verify.rules import dot, matmul
from llama_layers.verify.tracked import Tracked, constant, read
from tests.support import oracle
from tests.support.bounds_cases import causal, heads
from tests.support.engines import through

FLOAT32 = Rounding("float32", "float32")
FLUSHES = Rounding("float32", "float32", RoundingProfile("flushes", flushes=True))
EXCESS = Rounding("float32", "float32", PROFILES["XLA with excess precision"], "bfloat16")
U = 2.0**-24


def fractions(array):
    return oracle.exact(np.asarray(array, np.float32))


# Each formula is evaluated on tracked numbers, on float32 numbers and on fractions.
FORMULAS = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a / b,
    "sum of products": lambda a, b: a * b + b * b,
    "products that cancel": lambda a, b: a * b - b * a + a,
    "quotient of a difference": lambda a, b: (a - b) / (a * a + 1),
    "inverse": lambda a, b: 1 / (a * a + 3) - b,
    "difference from a number": lambda a, b: (2 - a) * -b,
}


@pytest.mark.parametrize("name", FORMULAS)
@given(data=st.data())
def test_true_errors_are_within_the_limit(name, data):
    a, b = (data.draw(arrays((8,), max_magnitude=2.0**20)) for _ in range(2))
    formula = FORMULAS[name]
    bound = formula(read("a", a, FLOAT32), read("b", b, FLOAT32))
    off = np.broadcast_to(bound.off, (8,))
    with np.errstate(all="ignore"):
        computed = formula(a, b)
    assert computed.dtype == np.float32
    for i in np.flatnonzero(np.isfinite(off) & np.isfinite(bound.exact)):
        exact = formula(fractions(a)[i], fractions(b)[i])
        assert abs(Fraction(float(computed[i])) - exact) <= Fraction(float(off[i]))


ONE_ROUNDING = {
    "sum": (lambda a, b: a + b, np.add, 1),
    "product": (lambda a, b: a * b, np.multiply, 1),
    "quotient": (lambda a, b: a / b, np.divide, 1),
    "root": (lambda a, b: a.sqrt(), lambda a, b: np.sqrt(a), 2),
    "inverse root": (lambda a, b: a.rsqrt(), lambda a, b: 1 / np.sqrt(a), 2),
    "exponential": (lambda a, b: a.exp(), lambda a, b: np.exp(a), 8),
    "function": (lambda a, b: a.apply(np.tanh), lambda a, b: np.tanh(a), 8),
}


@pytest.mark.parametrize("name", ONE_ROUNDING)
def test_each_operation_has_its_roundings_once(rng, name):
    """Errors of many numbers come near one rounding; what an engine is granted is that many."""
    tracked, function, roundings = ONE_ROUNDING[name]
    a, b = (rng.uniform(1, 2, 20_000).astype(np.float32) for _ in range(2))
    bound = tracked(read("a", a, FLOAT32), read("b", b, FLOAT32))
    exact = function(a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(bound.exact, exact, rtol=1e-15)
    np.testing.assert_allclose(bound.off, roundings * U * abs(exact), rtol=1e-6)
    nearest = exact.astype(np.float32)
    assert 0.6 < (abs(nearest - exact) / bound.off).max() * roundings <= 1


def test_errors_that_are_inherited():
    """Of bfloat16 numbers an engine had more digits: each operation carries their errors on."""
    x = np.array([1.0, 3.0, -2.0], np.float32)
    half = 2.0**-8 / (1 - 2.0**-8)
    a, size = read("a", x, EXCESS), abs(x.astype(float))
    steepest = math.e ** (3 * half) - 1
    for got, stated in (
        (a + 10, half * size),
        (a * 10, 10 * half * size),
        (a / 10, half * size / 10),
        (a * a, (2 * half + half**2) * size**2),
        (1 / a, half / (1 - half) / size),
        ((a * a).sqrt(), half * size),
        (a.apply(np.sin, 2.0), 2 * half * size),
        (-a, half * size),
        (a - a, 2 * half * size),
    ):
        np.testing.assert_allclose(got.off, stated, rtol=5e-3)
    np.testing.assert_allclose(a.exp().off[1], math.exp(3) * steepest, rtol=1e-4)
    low = read("a", np.float32([4.0]), EXCESS).rsqrt()
    np.testing.assert_allclose(low.off, 0.5 * (1 / math.sqrt(1 - half) - 1), rtol=1e-3)


def test_what_is_exact():
    """Products with 0 and 1, sums with 0, numbers that fit a format, and signs."""
    x = read("x", np.float32([0.1, 0, np.inf]), FLOAT32)
    for same in (x * 1, x * -1, x + 0, x / 1, -x, 0 - x, x[::-1], x.where([True] * 3, 5.0)):
        assert not same.off.any()
    assert not (x[:2] * 0).off.any()
    assert (x[:1] + x[:1]).off.all()
    assert not constant(0.5, FLOAT32).off
    assert constant(0.1, FLOAT32).off
    half = read("x", np.float32([0.5, 0.1]), FLOAT32).to(Rounding("float16", "float32").out)
    np.testing.assert_allclose(half.off, [0, 2.0**-11 * 0.1], atol=2.0**-24)


@pytest.mark.parametrize("n", [2, 64, 2000])
def test_sums_that_lose_as_much_as_they_can(n):
    """Each number after the first is just too small to change a float32 sum of 1."""
    row = np.full((1, n), U * (1 - 2.0**-20), np.float32)
    row[0, 0] = 1
    total, exact = np.float32(0), sum(fractions(row[0]))
    for number in row[0]:
        total += number
    assert total == 1
    x, ones = read("x", row, FLOAT32), read("x", np.ones((1, n), np.float32), FLOAT32)
    lost = float(exact - 1)
    for bound, scale, first in (
        (x.sum(), 1, 0),
        (x.mean(), n, 2),
        (dot(x, ones), 1, 1),
        (matmul(x, np.ones((1, n), np.float32)), 1, 1),
        (dot(x, ones, np.zeros(1)), 1, 2),
        (dot(x, ones, scale=0.5), 2, 5),
    ):
        reached = lost / (scale * bound.off[0, 0])
        assert reached <= 1
        assert reached > 0.98 * (n - 1) / (n - 1 + first)


def test_a_bias_is_one_more_term(rng):
    """A product rounded, and its sum with a small number: two roundings, and both are reached."""
    w, b = (rng.uniform(1, 2, 20_000).astype(np.float32) for _ in range(2))
    x, b = np.float32([[1.7]]), b / np.float32(64)
    bound = matmul(read("x", x, FLOAT32), w[:, None], b)
    computed = (x * w + b).astype(np.float64)
    exact = float(x[0, 0]) * w.astype(np.float64) + b
    assert 0.6 < (abs(computed - exact) / bound.off).max() <= 1


def test_usual_errors_cancel():
    """4 sqrt(n) u, and never more than the limit."""
    for n in (4, 16, 17, 1024):
        x = read("x", np.ones((1, n), np.float32), FLOAT32)
        product = dot(x, x)
        usual = min(4 * math.sqrt(n) * U, n * U / (1 - n * U))
        assert product.usual[0, 0] == pytest.approx(n * usual, rel=1e-5)
        assert (x.sum().usual <= x.sum().off).all()
    rounded = read("x", np.ones((1, 1024), np.float32), EXCESS)
    assert rounded.sum().usual == pytest.approx(rounded.sum().off / 8, rel=1e-2)


def test_nothing_is_said_of_what_may_overflow_or_divide_by_zero():
    big = read("x", np.float32([[3e38, 3e38]]), FLOAT32)
    for bound in (big + big, big * big, big.sum(), big.exp(), dot(big, big), big.mean()):
        assert np.isinf(bound.off).all()
    # Numbers that cancel, of which a part of the sum may overflow.
    assert np.isinf(read("x", np.float32([[3e38, 3e38, -3e38, -3e38]]), FLOAT32).mean().off)
    near = read("x", np.float32([1.0]), EXCESS) - 1
    for bound in (1 / near, near.rsqrt()):
        assert np.isinf(bound.off).all()
    # A zero that is certain divides to a certain infinity.
    zero = read("x", np.float32([0.0]), FLOAT32)
    assert not zero.rsqrt().off.any()
    assert (1 / zero).off[0] < 1e-40
    infinite = read("x", np.float32([np.inf]), FLOAT32)
    assert np.isinf((infinite * near).off).all()  # whose sign is not sure


def test_engines_that_flush():
    tiny, one = (read("x", np.float32([x]), FLUSHES) for x in (2.0**-127, 1.0))
    small = read("x", np.float32([2.0**-70]), FLUSHES)
    for bound in (tiny * one, tiny + one, small * small, tiny / one, tiny + tiny, tiny.exp()):
        assert bound.off[0] >= min(abs(bound.exact[0]), 2.0**-127)
    assert (tiny + 2.0**-120).off[0] >= 2.0**-127
    assert (tiny - tiny).off[0] == 0  # flushed both, or neither
    assert (one + one).off[0] == pytest.approx(2 * U)


def test_matrices_in_blocks(rng):
    """The rows of a matrix do not depend on those before them."""
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    w, b = (rng.standard_normal(s).astype(np.float32) for s in ((2500, 8), (2500,)))
    whole = matmul(read("x", x, FLOAT32), w, b)
    part = matmul(read("x", x, FLOAT32), w[2000:], b[2000:])
    assert whole.shape == (2, 3, 2500)
    np.testing.assert_allclose(whole.exact, x.astype(float) @ w.astype(float).T + b, rtol=1e-9)
    np.testing.assert_allclose(whole.off[..., 2000:], part.off, rtol=1e-9)


# Formulas with a mistake


def test_a_wrong_norm(rng):
    """eps outside the root, in float32 and as transformers rounds: told from the right one."""
    x = (1e-3 * rng.standard_normal((4, 64))).astype(np.float32)
    weight = (1 + 0.1 * rng.standard_normal(64)).astype(np.float32)
    norm = Norm(x, weight, 1e-5)

    def outside(n):
        return (n.x / ((n.x * n.x).mean().sqrt() + n.eps)).step("norm_before_weight") * n.weight

    theirs = x / (np.sqrt((x * x).mean(-1, keepdims=True)) + np.float32(1e-5))
    assert judge(theirs * weight, norm.evaluate(outside, FLOAT32)).verdict == "PASS"
    assert judge(theirs * weight, norm.bound(FLOAT32)).ratio > 1e3
    right = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * weight
    assert judge(right, norm.evaluate(outside, FLOAT32)).ratio > 1e3
    half = Rounding("bfloat16", "float32", PROFILES["transformers"])
    rounded = theirs.astype("bfloat16").astype(np.float32) * weight
    assert judge(rounded.astype("bfloat16"), norm.evaluate(outside, half)).verdict == "PASS"


def test_a_wrong_gate(rng):
    g, h = (rng.standard_normal(500).astype(np.float32) for _ in range(2))

    def gelu(view):
        inner = (view.gate + 0.044715 * (view.gate * view.gate * view.gate)) * 0.7978845608
        return 0.5 * view.gate * (1 + inner.apply(np.tanh)) * view.up

    cube = np.float32(0.044715) * (g * g * g)
    theirs = np.float32(0.5) * g * (1 + np.tanh((g + cube) * np.float32(0.7978845608))) * h
    assert theirs.dtype == np.float32
    gate = Gate(g, h)
    assert judge(theirs, gate.evaluate(gelu, FLOAT32)).verdict == "PASS"
    assert judge(theirs, gate.bound(FLOAT32)).ratio > 100


def test_a_wrong_product(rng):
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((3, 64), (5, 64)))
    b = rng.standard_normal(5).astype(np.float32)
    linear = Linear(x, w, b)
    bound = linear.evaluate(lambda v: matmul(v.x, v.weight, -v.bias), FLOAT32)
    assert judge(x @ w.T - b, bound).verdict == "PASS"
    assert judge(x @ w.T + b, bound).verdict == "FAIL"


def test_wrong_weights_of_attention(rng):
    """Normalised over the queries; all queries of a head are there at once."""
    q, k, v = heads(rng, "float32")
    mask = causal(24)
    scores = np.einsum("bshd,bhtd->bhst", q, np.repeat(k, 3, axis=2).swapaxes(1, 2))
    e = np.where(mask, np.exp(scores * np.float32(0.125)), 0)
    p = e / e.sum(axis=-2, keepdims=True)

    def over_queries(view):
        weights = view.scores().where(view.allowed, -np.inf).exp()
        return view.weigh(weights / weights.sum(axis=-2))

    y = np.einsum("bhst,bhtd->bshd", p, np.repeat(v, 3, axis=2).swapaxes(1, 2))
    attention = Attention(q, k, v, mask, 0.125)
    assert judge(y, attention.evaluate(over_queries, FLOAT32)).verdict == "PASS"
    assert judge(y, attention.bound(FLOAT32)).ratio > 100
    rounds = Rounding("float32", "float32", RoundingProfile("p", probabilities="bfloat16"))
    rounded = np.einsum(
        "bhst,bhtd->bshd", through(p, "bfloat16"), np.repeat(v, 3, 2).swapaxes(1, 2)
    )
    assert judge(rounded, attention.evaluate(over_queries, rounds)).verdict == "PASS"
    assert judge(rounded, attention.evaluate(over_queries, FLOAT32)).verdict == "FAIL"
    alone = Softmax((scores * np.float32(0.125)).astype(np.float32), mask)
    assert judge(p, alone.evaluate(over_queries, FLOAT32)).verdict == "PASS"


def test_an_own_softmax_step_by_step(rng):
    """Looser than the rule, in which an error of the largest score cancels; and right."""
    q, k, _ = heads(rng, "float32")
    scores = np.einsum("bshd,bhtd->bhst", q, np.repeat(k, 3, axis=2).swapaxes(1, 2))
    softmax = Softmax((scores / 8).astype(np.float32), causal(24))

    def steps(view):
        hidden = view.scores().where(view.allowed, -np.inf)
        e = (hidden - hidden.max()).exp()
        return e / e.sum()

    rule, loose = softmax.bound(EXCESS), softmax.evaluate(steps, EXCESS)
    np.testing.assert_allclose(loose.exact, rule.exact, rtol=1e-12)
    # Only a row's single key is certain to have all the weight.
    assert (loose.limit[..., 1:, :] >= 0.99 * rule.limit[..., 1:, :]).all()


def test_the_shape_and_the_size():
    x = Tracked(np.array([[-2.0, np.inf]]), np.array(0.5), np.array(0.5), FLOAT32, FLOAT32.sums)
    assert x.shape == (1, 2)
    np.testing.assert_array_equal(x.size, [[2.5, 0.5]])
    np.testing.assert_array_equal(x.only([True, False]).off, [[0.5, np.inf]][0])


def test_a_norm_of_nan_is_nan_and_one_of_an_overflow_may_be_anything():
    x = np.ones((1, 64), np.float32)
    x[0, 1] = np.nan
    weight = np.ones(64, np.float32)
    bound = Norm(x, weight, 1e-5).bound(FLOAT32)
    assert np.isinf(bound.ratio(np.ones((1, 64), np.float32))).all()
    assert (bound.ratio(np.full((1, 64), np.nan, np.float32)) == 0).all()
    # The stream may have overflowed where it was stored, and not where the engine went on.
    x[0, 1] = np.inf
    bound = Norm(x, weight, 1e-5).bound(FLOAT32)
    assert (bound.ratio(np.full((1, 64), 0.01, np.float32))[0, 2:] == 0).all()
