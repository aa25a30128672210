"""`forward` against naive loops: whole, in chunks and token by token, padded and not."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_layers import KVCache, Llama, embed, forward, generate
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits, configs
from tests.support import decoder_oracle
from tests.support.random_models import (
    CONFIGS,
    GQA,
    model_of,
    random_weights,
    run_in_chunks,
    ways,
)

# Of the largest logit. A pass adds a few hundred products one after another, each rounded to
# 2**-53 of its size, and scores enter exponents; this is 10**4 roundings.
FLOAT64 = 1e-12
# As many roundings to 2**-24 would hide bugs; the longest chain of these models, 3 layers of 8
# dependent operations with sums of at most 14 terms, is 336, which is 2e-5.
FLOAT32 = 2e-5


def assert_close(computed, expected, tolerance=FLOAT64):
    computed = to_numpy(computed).astype(np.float64)
    assert computed.shape == expected.shape
    worst = np.abs(computed - expected).max(initial=0)
    assert worst <= tolerance * max(1.0, np.abs(expected).max(initial=0)), worst


def lengths_in_use(positions, cuts):
    """For each column of positions [B, S], how many positions its chunk had in use."""
    lengths = []
    for start, stop in zip([0, *cuts], [*cuts, positions.shape[1]], strict=True):
        lengths += [int(positions[:, start:stop].max()) + 1] * (stop - start)
    return lengths


def assert_rows_close(computed, weights, config, ids, keep, cuts, tolerance=FLOAT64):
    """Each row's real tokens have the logits that they have alone."""
    positions = np.maximum(np.cumsum(keep, axis=1) - 1, 0)
    lengths = np.array(lengths_in_use(positions, cuts))
    assert np.isfinite(computed).all()
    for row in range(ids.shape[0]):
        real = keep[row].astype(bool)
        if real.any():
            expected = decoder_oracle.logits(weights, config, ids[row][real], None, lengths[real])
            assert_close(computed[row][real], expected, tolerance)


@pytest.mark.parametrize("way", ["whole", "chunks", "tokens"])
@pytest.mark.parametrize("name", CONFIGS)
def test_like_naive_loops(name, way, rng):
    config = CONFIGS[name]
    weights = random_weights(config)
    model = model_of(config, weights)
    ids = rng.integers(config.vocab_size, size=(2, 11))
    cuts = ways(11, rng)[way]
    keep = np.ones(ids.shape, int)
    if way == "whole":
        output = forward(model, ids)
        assert output.cache is None
        assert output.logits.dtype == np.float64
        assert_rows_close(output.logits, weights, config, ids, keep, cuts)
    assert_rows_close(run_in_chunks(model, ids, cuts), weights, config, ids, keep, cuts)


@pytest.mark.parametrize("way", ["whole", "chunks", "tokens"])
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding_reaches_no_token(side, way, rng):
    config = CONFIGS["some windows" if side == "left" else "biases"]
    weights = random_weights(config)
    model = model_of(config, weights)
    ids = rng.integers(config.vocab_size, size=(4, 9))
    columns = np.arange(9)
    keep = {
        "left": columns >= np.array([[0], [1], [4], [8]]),
        "right": columns < np.array([[9], [8], [4], [1]]),
        "anywhere": rng.random((4, 9)) < 0.6,
    }[side]
    cuts = ways(9, rng)[way]
    assert_rows_close(run_in_chunks(model, ids, cuts, keep=keep), weights, config, ids, keep, cuts)
    if way == "whole":
        whole = forward(model, ids, attention_mask=keep).logits
        assert_rows_close(whole, weights, config, ids, keep, cuts)
        assert_same_bits(forward(model, ids, attention_mask=keep.astype(np.int8)).logits, whole)


@settings(max_examples=40)
@given(data=st.data(), config=configs(max_heads=4))
def test_any_config_padding_and_cuts(data, config):
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weights = random_weights(config, rng.integers(2**32))
    ids = rng.integers(config.vocab_size, size=(batch, count))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    keep = np.ones(ids.shape, bool)
    if data.draw(st.booleans()):
        if config.sliding_window is None:
            keep = rng.random(ids.shape) < 0.7
        else:  # a window counts padding between tokens
            keep = np.arange(count) >= rng.integers(count, size=(batch, 1))
    model = model_of(config, weights)
    computed = run_in_chunks(model, ids, cuts, keep=None if keep.all() else keep)
    assert_rows_close(computed, weights, config, ids, keep, cuts)


def test_garbage_under_padding_changes_no_token(rng):
    config = CONFIGS["gqa"]
    model = model_of(config, random_weights(config))
    ids = rng.integers(config.vocab_size, size=(2, 6))
    keep = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    other = np.where(keep, ids, (ids + 1) % config.vocab_size)
    first = forward(model, ids, attention_mask=keep).logits
    second = forward(model, other, attention_mask=keep).logits
    assert_close(first[keep], second[keep])
    assert np.abs(first - second)[~keep].max() > 0.01  # padding itself is not ignored


@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(CONFIGS)))
def test_causal(seed, name):
    rng = np.random.default_rng(seed)
    config = CONFIGS[name]
    model = model_of(config, random_weights(config))
    ids = rng.integers(config.vocab_size, size=(1, 7))
    place = int(rng.integers(7))
    changed = ids.copy()
    changed[0, place] = (ids[0, place] + 1) % config.vocab_size
    before, after = (forward(model, each).logits[0] for each in (ids, changed))
    assert_same_bits(before[:place], after[:place])  # the same shapes, the same sums
    assert (np.abs(before - after)[place] > 1e-6).any()


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5)])
def test_given_positions(shape, rng):
    weights = random_weights(GQA)
    model = model_of(GQA, weights)
    ids = rng.integers(GQA.vocab_size, size=(2, 5))
    positions = rng.integers(100, size=shape)
    computed = forward(model, ids, positions=positions).logits
    for row, own in enumerate(np.broadcast_to(positions, (2, 5))):
        assert_close(computed[row], decoder_oracle.logits(weights, GQA, ids[row], own))


def test_only_distances_between_positions_count(rng):
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(GQA.vocab_size, size=(1, 6))
    near = forward(model, ids, positions=np.arange(6)).logits
    # The phases of position 10**6 are off by 10**6 * 2**-53, 10**-10.
    assert_close(forward(model, ids, positions=np.arange(6) + 10**6).logits, near, 1e-8)
    assert np.abs(forward(model, ids, positions=2 * np.arange(6)).logits - near).max() > 0.01


def test_last_only_is_the_last_row(rng):
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(GQA.vocab_size, size=(3, 5))
    whole = forward(model, ids).logits
    last = forward(model, ids, last_only=np.True_).logits
    assert last.shape == (3, 1, GQA.vocab_size)
    assert_close(last, whole[:, 4:, :])


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_nothing_in_nothing_out(shape):
    model = model_of(GQA, random_weights(GQA))
    ids = np.zeros(shape, int)
    assert forward(model, ids).logits.shape == (*shape, GQA.vocab_size)
    if shape[0]:
        cache = forward(model, ids, cache=KVCache.create(model, 2, 4)).cache
        assert cache.length == 0


@pytest.mark.parametrize("name", ["biases", "some windows", "llama3"])
@pytest.mark.parametrize("way", ["whole", "tokens"])
def test_on_every_library(backend, name, way, rng):
    config = CONFIGS[name]
    weights = random_weights(config, dtype=np.float32)
    model = model_of(config, weights, backend.array)
    ids = rng.integers(config.vocab_size, size=(2, 5))
    keep = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    computed = run_in_chunks(model, ids, ways(5, rng)[way], keep=keep, array=backend.array)
    assert computed.dtype == np.float32
    wide = {key: array.astype(np.float64) for key, array in weights.items()}
    for row, start in ((0, 2), (1, 0)):
        expected = decoder_oracle.logits(wide, config, ids[row, start:])
        assert_close(computed[row, start:], expected, FLOAT32)
    output = forward(model, backend.array(ids), attention_mask=backend.array(keep))
    assert backend.holds(output.logits)


def test_same_bits_again(rng):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    ids = rng.integers(GQA.vocab_size, size=(2, 6))
    assert_same_bits(forward(model, ids).logits, forward(model, ids).logits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_are_widened_exactly(dtype, rng):
    narrow = random_weights(GQA, dtype=np.dtype(dtype))
    ids = rng.integers(GQA.vocab_size, size=(1, 6))
    logits = forward(model_of(GQA, narrow), ids).logits
    assert logits.dtype == np.float32
    wide = {name: array.astype(np.float64) for name, array in narrow.items()}
    assert_close(logits[0], decoder_oracle.logits(wide, GQA, ids[0]), FLOAT32)


def test_whole_model_in_float64_only_rounds_in_float64(rng):
    """One float32 anywhere would show as an error of 1e-8 at the least."""
    weights = random_weights(GQA)
    ids = rng.integers(GQA.vocab_size, size=(1, 6))
    seen = []

    def tap(name, array):
        seen.append(array.dtype)
        return array

    forward(model_of(GQA, weights), ids, tap=tap)
    assert set(seen) == {np.dtype(np.float64)}


IDS = np.array([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (IDS.tolist(), {}, TypeError, "input_ids: expected an array"),
        (IDS.astype(np.float32), {}, TypeError, "input_ids: .* integer dtype, got float32"),
        (IDS > 0, {}, TypeError, "input_ids: expected an integer dtype, got bool"),
        (IDS[0], {}, ValueError, r"input_ids: expected shape \[B, S\], got \[3\]"),
        (IDS + 10, {}, ValueError, "input_ids: expected ids from 0 to 12, got 11 to 16"),
        (IDS - 2, {}, ValueError, "input_ids: expected ids from 0 to 12, got -1 to 4"),
        (IDS, {"positions": [0, 1, 2]}, TypeError, "positions: expected an array"),
        (IDS, {"positions": np.arange(3.0)}, TypeError, "positions: expected an integer dtype"),
        (
            IDS,
            {"positions": np.arange(2)},
            ValueError,
            r"positions: expected shape \[3\] or \[2, 3\], got \[2\]",
        ),
        (IDS, {"positions": np.ones((3, 3), int)}, ValueError, r"positions: .* got \[3, 3\]"),
        (IDS, {"positions": np.arange(3) - 1}, ValueError, "positions: expected zero or more"),
        (IDS, {"attention_mask": np.ones((2, 3))}, TypeError, "attention_mask: .* got float64"),
        (
            IDS,
            {"attention_mask": np.ones((2, 4), int)},
            ValueError,
            r"attention_mask: expected shape \[2, 3\], got \[2, 4\]",
        ),
        (IDS, {"attention_mask": np.ones(3, int)}, ValueError, r"attention_mask: .* got \[3\]"),
        (IDS, {"attention_mask": IDS}, ValueError, "attention_mask: expected 0 and 1 only"),
    ],
)  # fmt: skip
def test_refuses(ids, options, error, message):
    model = model_of(GQA, random_weights(GQA))
    with pytest.raises(error, match=message):
        forward(model, ids, **options)


def test_embedding_is_a_lookup_bit_for_bit(backend, rng):
    table = rng.standard_normal((7, 3)).astype(np.float32)
    table[2], table[3] = np.nan, -0.0
    ids = rng.integers(7, size=(4, 5))
    found = embed(backend.array(ids), backend.array(table))
    assert backend.holds(found)
    assert_same_bits(found, table[ids])
    assert embed(backend.array(ids[:, :0]), backend.array(table)).shape == (4, 0, 3)
    with pytest.raises(ValueError, match=r"table: expected shape \[vocab_size, hidden_size\], got"):
        embed(backend.array(ids), backend.array(table[0]))


def test_refuses_arrays_of_other_libraries_and_devices():
    here, there = (array_api_strict.Device(name) for name in ("device1", "CPU_DEVICE"))
    weights = random_weights(GQA, dtype=np.float32)
    model = model_of(GQA, weights, lambda a: array_api_strict.asarray(a, device=here))
    ids = array_api_strict.asarray(IDS, device=here)
    another = "expected an array of the same library as input_ids"
    with pytest.raises(TypeError, match="input_ids: expected an array of the same library as we"):
        forward(model, IDS)
    with pytest.raises(TypeError, match=f"attention_mask: {another}"):
        forward(model, ids, attention_mask=np.ones((2, 3), bool))
    with pytest.raises(TypeError, match=f"positions: {another}"):
        forward(model, ids, positions=np.arange(3))
    with pytest.raises(ValueError, match="input_ids: expected to be on the device of weights"):
        forward(model, array_api_strict.asarray(IDS, device=there))


def test_the_last_token_is_no_padding():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    ids, mask = np.array([[1, 2, 3], [3, 2, 1]]), np.array([[1, 1, 0], [1, 1, 1]])
    with pytest.raises(ValueError, match="last_only: expected prompts padded before their first"):
        forward(model, ids, attention_mask=mask, last_only=True)
    assert forward(model, ids, attention_mask=mask[:, ::-1], last_only=True).logits.shape[1] == 1


def test_a_cache_of_another_kind():
    with pytest.raises(TypeError, match="cache: expected a KVCache, got int"):
        forward(
            model_of(GQA, random_weights(GQA, dtype=np.float32)),
            np.array([[1]]),
            cache=3,
        )


def test_the_name_of_a_model_is_not_a_model():
    model = model_of(GQA, random_weights(GQA))
    ids = np.array([[1, 2]])
    for call in (
        lambda: forward("smollm2-135m", ids),
        lambda: generate("smollm2-135m", ids, max_new_tokens=1),
        lambda: KVCache.create("smollm2-135m", 1, 4),
    ):
        with pytest.raises(TypeError, match=r"^model.*: expected a Llama, as load .*, got str"):
            call()
    with pytest.raises(ValueError, match="weights: expected 3 layers, as config says, got 2"):
        Llama(replace(GQA, num_hidden_layers=3), model.weights)
    with pytest.raises(TypeError, match="config: expected LlamaConfig, got int"):
        Llama(1, model.weights)
    with pytest.raises(TypeError, match="weights: expected LlamaWeights, got dict"):
        Llama(GQA, {})
