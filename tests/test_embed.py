"""`embed`: rows of the table, bit for bit."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import embed
from llama_layers.testing import arrays, assert_same_bits, configs, input_ids


@given(data=st.data(), config=configs())
def test_rows_bit_for_bit(backend, data, config):
    ids = data.draw(input_ids(config))
    table = data.draw(arrays((config.vocab_size, config.hidden_size), max_magnitude=np.inf))
    table[0, 0] = np.nan
    x = embed(backend.array(ids), backend.array(table))
    assert backend.holds(x)
    expected = np.array([[table[token] for token in text] for text in ids])
    assert_same_bits(x, expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_keeps_the_dtype(dtype, rng):
    table = rng.standard_normal((5, 3)).astype(dtype)
    assert_same_bits(embed(np.array([[4, 0]]), table), table[[4, 0]][None])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_any_integers(backend, dtype):
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    ids = backend.array(np.array([[2], [0]], dtype))
    assert_same_bits(embed(ids, backend.array(table)), table[[[2], [0]]])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_no_tokens(backend, shape):
    ids = backend.array(np.zeros(shape, np.int64))
    assert embed(ids, backend.array(np.ones((4, 5), np.float32))).shape == (*shape, 5)


TABLE = np.zeros((4, 2), np.float32)


@pytest.mark.parametrize(
    ("ids", "table", "error", "message"),
    [
        (np.array([[0, 4]]), TABLE, ValueError, "input_ids: expected ids from 0 to 3, got 0 to 4"),
        (np.array([[-1, 2]]), TABLE, ValueError, "input_ids: .* 0 to 3, got -1 to 2"),
        (np.array([[0]]), TABLE[:0], ValueError, "input_ids: expected ids from 0 to -1"),
        (np.array([0]), TABLE, ValueError, r"input_ids: expected shape \[B, S\], got \[1\]"),
        (np.array([[0]]), TABLE[0], ValueError, r"table: expected shape \[vocab.*, got \[2\]"),
        (np.array([[0.0]]), TABLE, TypeError, "input_ids: expected an integer dtype, got float64"),
        (np.array([[True]]), TABLE, TypeError, "input_ids: expected an integer dtype, got bool"),
        ([[0]], TABLE, TypeError, "input_ids: expected an array of NumPy, .*, got list"),
        (
            np.array([[0]]),
            array_api_strict.zeros((4, 2)),
            TypeError,
            "table: expected an array of the same library as input_ids",
        ),
    ],
)
def test_refuses(ids, table, error, message):
    with pytest.raises(error, match=message):
        embed(ids, table)


def test_refuses_devices_that_differ():
    ids = array_api_strict.asarray([[0]], device=array_api_strict.Device("device1"))
    with pytest.raises(ValueError, match="table: expected to be on the device of input_ids"):
        embed(ids, array_api_strict.zeros((4, 2)))
