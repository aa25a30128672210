"""Tokens from logits of more than one block, and embeddings: the kernels by themselves."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers.backends.cupy import launch
from tests.support.emulator import needs_compiler
from tests.support.installed import on_device

pytestmark = [needs_compiler, pytest.mark.usefixtures("cupy")]

SIZES = [1, 2047, 2048, 2049, 9001]  # on both sides of what a block takes


def chosen(logits):
    ids = on_device(np.full(len(logits), -9, np.int32))
    launch.argmax(on_device(logits), ids, launch.draw_scratch(*logits.shape))
    return ids.get()


def drawn(logits, temperature, uniforms):
    """Ids [steps, M], a step for each row of uniforms."""
    given, rows = on_device(logits), on_device(uniforms)
    scratch = launch.draw_scratch(*logits.shape)
    found = []
    for step in range(len(uniforms)):
        ids, count = (on_device(np.int32(n)) for n in ([-9] * len(logits), [step]))
        launch.sample(given, rows, count, np.float32(temperature), ids, scratch)
        found.append(ids.get())
    return np.array(found)


def by_numpy(logits, temperature, uniforms):
    wide = logits.astype(np.float64)
    weights = np.exp((wide - wide.max(axis=1, keepdims=True)) / temperature)
    sums = np.cumsum(weights, axis=1)
    targets = uniforms * sums[:, -1]
    return np.array([[(row > t).argmax() for row, t in zip(sums, step, strict=True)]
                     for step in targets])  # fmt: skip


@pytest.mark.parametrize("vocabulary", SIZES)
def test_argmax(vocabulary, rng):
    logits = rng.standard_normal((5, vocabulary)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, vocabulary // 2 :] = 9  # the first of many, in any share
    logits[3, -1] = np.inf
    np.testing.assert_array_equal(chosen(logits), logits.argmax(axis=1))
    for place in (0, vocabulary // 2, vocabulary - 1):
        wrong = logits.copy()
        wrong[[0, 3], place] = np.nan
        wrong[3, 0] = np.nan
        np.testing.assert_array_equal(chosen(wrong)[[0, 3]], [-1, -1])


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("vocabulary", SIZES)
def test_sample(vocabulary, temperature, rng):
    logits = (4 * rng.standard_normal((3, vocabulary))).astype(np.float32)
    logits[1, ::2] = -np.inf
    logits[1, -1] = 0
    uniforms = np.concatenate([rng.random((12, 3)), [[0.0] * 3, [1 - 2.0**-53] * 3]])
    expected = by_numpy(logits, np.float32(temperature), uniforms)
    found = drawn(logits, temperature, uniforms)
    np.testing.assert_array_equal(found[:-1], expected[:-1])
    # The last number is within the roundings of the sums: a token with a weight all the same.
    assert (logits[range(3), found[-1]] > -np.inf).all()


def test_rounding_leads_to_the_last_token_with_a_weight():
    logits = np.full((1, 5000), -np.inf, np.float32)
    logits[0, [10, 3000]] = 0
    assert drawn(logits, 1.0, np.array([[1.0]]))[0, 0] == 3000  # not less than the sum of all


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 2500, 4999])
def test_no_token_of_nan_or_infinity(wrong, place):
    logits = np.zeros((2, 5000), np.float32)
    logits[1, place] = wrong
    np.testing.assert_array_equal(drawn(logits, 1.0, np.array([[0.0, 0.5]])), [[0, -1]])
    logits[1] = -np.inf
    np.testing.assert_array_equal(drawn(logits, 1.0, np.array([[0.0, 0.5]])), [[0, -1]])


@pytest.mark.parametrize("columns", [1, 256, 300])
def test_embed(columns, rng):
    table = rng.standard_normal((7, columns)).astype(np.float16)
    ids = np.array([3, 6, -1, 0, 7], np.int32)
    y = on_device(np.full((5, columns), np.nan, np.float16))
    launch.embed(on_device(ids), on_device(table), y)
    expected = [table[i] if 0 <= i < 7 else np.zeros(columns) for i in ids]
    np.testing.assert_array_equal(y.get(), expected)
