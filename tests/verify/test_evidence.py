"""Wider limits explain an array only where it shows more than errors of a moderate size."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, check, mistakes
from llama_layers.verify.bound import Bound
from llama_layers.verify.fitness import leaves_a_part
from llama_layers.verify.mistakes.evidence import (
    has_no_mean,
    is_linear,
    is_of_low_rank,
    is_relative,
    is_spread,
    on_a_coarser_grid,
)
from llama_layers.verify.mistakes.registry import Kind, Mistake
from llama_layers.verify.operations import Linear
from tests.support.ported import BASE
from tests.support.random_models import model_of, random_weights

CONFIG = replace(BASE, hidden_size=128, head_dim=32, num_hidden_layers=1)
LAYER = "model.layers.0"
WEIGHTS = random_weights(CONFIG, 0, np.float32)
X = np.random.default_rng(3).standard_normal((1, 24, 128)).astype(np.float32)
W = WEIGHTS[f"{LAYER}.self_attn.q_proj.weight"]
Y = X @ W.T
RNG = np.random.default_rng(4)


def in_steps(array, axis=-1):
    """int8, with a scale for each row."""
    step = np.abs(array).max(axis=axis, keepdims=True) / 127
    return np.round(array / step) * step


def in_eight_bits(array):
    scale = 448 / np.abs(array).max()
    return (array * scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / scale


def flipped():
    weight = W.copy()
    weight.view(np.uint32)[3, 5] ^= 1 << 29
    return weight


def with_row(factor):
    weight = W.copy()
    weight[7] *= factor
    return weight


def low_rank(rank=1, size=0.01):
    return W + size * W.std() * RNG.standard_normal((128, rank)) @ RNG.standard_normal((rank, 128))


WRONG = {
    "int8 weights": X @ in_steps(W).T,
    "int8 weights, by column": X @ in_steps(W, 0).T,
    "int8 activations": in_steps(X) @ W.T,
    "int8 weights and activations": in_steps(X) @ in_steps(W).T,
    "fp8 activations": in_eight_bits(X) @ W.T,
    "fp8 weights": X @ in_eight_bits(W).T,
    "fp8 results": in_eight_bits(Y),
    "int8 results": in_steps(Y),
    "a corrupted row": X @ with_row(1.02).T,
    "a flipped bit": X @ flipped().T,
    "a bias of one number": Y + 0.02 * Y.std(),
    "a bias": Y + 0.02 * Y.std() * RNG.standard_normal(128),
    "rolled heads": np.roll(Y, 32, axis=-1),
    "a merged LoRA": X @ low_rank().T,
    "a merged LoRA of rank 8": X @ low_rank(8, 0.003).T,
    "pruned weights": X @ np.where(np.abs(W) < np.quantile(np.abs(W), 0.1), 0, W).T,
    "noise in proportion": Y * (1 + 0.01 * RNG.standard_normal(Y.shape)),
}


def named(y, dtype):
    """What a check names, of a port that rounds all it has to a format."""
    x, w = X, W
    if dtype != np.float32:
        x = X.astype(dtype)
        w = W.astype(dtype).astype(np.float32)
    weights = WEIGHTS | {f"{LAYER}.self_attn.q_proj.weight": w}
    arrays = {f"{LAYER}.input_layernorm": x, f"{LAYER}.self_attn.q_proj": y.astype(dtype)}
    (result,) = check(Trace(arrays), model_of(CONFIG, weights)).failures
    return {explanation.name for explanation in result.explanations}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_not_taken_for_narrow_sums(name, dtype):
    told = named(WRONG[name], dtype)
    assert not any(said.startswith(("sums kept", "result rounded")) for said in told)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_narrow_sums_are_told(dtype):
    x, w = (y.astype(dtype).astype(np.float32) for y in (X, W))
    total = np.zeros(Y.shape, ml_dtypes.bfloat16)
    for k in range(128):
        total = (total + x[..., k, None] * w[:, k]).astype(ml_dtypes.bfloat16)
    assert named(total, dtype) == {"sums kept in bfloat16"}


@pytest.mark.parametrize("shows", [None, lambda at, bound: True])
def test_whatever_widens_a_limit_has_a_test_of_its_own(shows):
    """And nothing else has one."""
    with pytest.raises(ValueError, match=r"^shows: expected a test of its own .*: mine$"):
        Mistake("mine", Linear, lambda n: n, "", loosens=shows is None, shows=shows)
    assert any(m.shows for m in mistakes.MISTAKES)
    assert {m.kind for m in mistakes.MISTAKES if m.loosens} <= {Kind.ROUNDING, Kind.SOLVED}


def test_products_with_a_factor_are_linear_in_it():
    x, noise = RNG.standard_normal((30, 100)), RNG.standard_normal((30, 80))
    product = x @ RNG.standard_normal((100, 80))
    assert is_linear([(product, x)])
    assert is_linear([(product + 10 * noise, x)])
    assert is_linear([(noise, x)]) is False
    assert is_linear([(noise[:3], x[:3])]) is None
    same = np.repeat(x[:5], 6, axis=0)
    assert is_linear([(np.repeat(noise[:5], 6, axis=0), same)]) is None


def test_low_rank():
    ones, noise = np.ones((40, 60)), RNG.standard_normal((40, 60))
    few = RNG.standard_normal((40, 4)) @ RNG.standard_normal((4, 60))
    assert is_of_low_rank(few, ones)
    assert is_of_low_rank(few + noise, ones)
    assert not is_of_low_rank(noise, ones)
    assert not is_of_low_rank(noise * RNG.uniform(0.2, 5, (40, 1)), ones)
    assert not is_of_low_rank(np.repeat(noise[:8], 5, axis=0), ones)


def test_errors_of_a_few_are_not_spread():
    error, ones = RNG.standard_normal((40, 50)), np.ones((40, 50))
    assert is_spread(error, ones)
    for places in (np.s_[3, 4], np.s_[3], np.s_[:, 4]):
        spoilt = error.copy()
        spoilt[places] += 100
        assert not is_spread(spoilt, ones)
        assert not is_spread(np.where(spoilt == error, 0, spoilt), ones)
    assert not is_spread(0 * error, ones)
    signs = np.sign(error[:, :20])  # none of them is larger than the others of its row or column
    assert is_spread(signs, ones[:, :20])
    for places in (np.s_[3], np.s_[:, 4]):
        for factor in (0, 10):
            spoilt = signs.copy()
            spoilt[places] *= factor
            assert not is_spread(spoilt, ones[:, :20])


def test_errors_to_one_side_have_a_mean():
    error = RNG.standard_normal((40, 50))
    assert has_no_mean(error)
    assert not has_no_mean(error + 0.2)
    assert not has_no_mean(error + RNG.standard_normal(50))
    assert not has_no_mean(error + RNG.standard_normal((40, 1)))


def test_what_is_left_of_a_change():
    """Rounding has nothing to do with what a mistake changes, in no channel and in no token."""
    right, change, noise = (RNG.standard_normal((1, 40, 50)) for _ in range(3))
    bound = Bound(right + change, np.full(right.shape, 0.1), np.full(right.shape, 0.01))
    assert not leaves_a_part(bound.exact + 0.01 * noise, bound, right)
    for places in (np.s_[:], np.s_[:, :, 4], np.s_[:, 7]):
        for share in (0.7, 1.3):
            shown = change.copy()
            shown[places] *= share
            assert leaves_a_part(right + shown + 0.01 * noise, bound, right)


def test_grids_and_proportions():
    y = RNG.standard_normal((20, 200))
    assert is_relative(y * RNG.standard_normal(y.shape), y)
    assert not is_relative(RNG.standard_normal(y.shape), y)
    assert on_a_coarser_grid(np.round(y * 30) / 30, y)
    assert not on_a_coarser_grid(y, y)
