"""`generate` against repeated full passes, and how texts end."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_layers import KVCache, forward, generate, sample
from llama_layers.arrays.transfer import to_numpy
from llama_layers.model import generate as generation
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights

STATIC = [name for name in CONFIGS if name not in ("dynamic", "longrope")]


def generated(model, ids, **options):
    steps = [to_numpy(step) for step in generate(model, ids, **options)]
    for step in steps:
        assert step.shape == (ids.shape[0],)
        assert np.issubdtype(step.dtype, np.integer)
    return np.stack(steps, axis=1)


def by_full_passes(model, ids, count, penalty=1.0, **options):
    """Each token from a pass over the whole text; one row at a time, without a cache."""
    rng = np.random.default_rng(options.pop("rng", None))
    rows = [list(row) for row in ids.tolist()]
    for _ in range(count):
        logits = []
        for row in rows:
            last = forward(model, np.array([row])).logits[0, -1].tolist()
            for token in set(row):
                # Keskar et al.: a logit that is repeated becomes smaller, whatever its sign.
                if penalty != 1.0:
                    last[token] = (
                        last[token] / penalty if last[token] > 0 else last[token] * penalty
                    )
            logits.append(last)
        for row, new in zip(rows, sample(np.array(logits), **options, rng=rng), strict=True):
            row.append(int(new))
    return np.array([row[ids.shape[1] :] for row in rows])


@pytest.mark.parametrize("name", STATIC)
def test_greedy_is_the_argmax_of_full_passes(name, rng):
    config = CONFIGS[name]
    model = model_of(config, random_weights(config))
    ids = rng.integers(config.vocab_size, size=(3, 4))
    for penalty in (1.0, 2.0):
        expected = by_full_passes(model, ids, 8, penalty, temperature=0.0)
        computed = generated(model, ids, max_new_tokens=8, repetition_penalty=penalty)
        np.testing.assert_array_equal(computed, expected)
    assert len(set(expected.ravel().tolist())) > 3  # with the penalty, not one token for ever


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1}]
)
def test_sampled_as_by_hand(options, rng):
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(2, 4))
    expected = by_full_passes(model, ids, 8, **options, rng=11)
    np.testing.assert_array_equal(
        generated(model, ids, max_new_tokens=8, **options, rng=11), expected
    )
    other = generated(model, ids, max_new_tokens=8, **options, rng=12)
    assert (other != expected).any()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repetition_penalty(penalty, temperature, rng):
    """At temperature 1 tokens of negative logits come up as well, which greedy never draws."""
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(4, 3))
    options = {"temperature": temperature, "rng": 3}
    expected = by_full_passes(model, ids, 8, penalty, **options)
    computed = generated(model, ids, max_new_tokens=8, repetition_penalty=penalty, **options)
    np.testing.assert_array_equal(computed, expected)


def test_padding_is_not_repeated():
    """An id under padding is no token of the prompt, and is not penalised."""
    model = model_of(GQA, random_weights(GQA))
    ids = np.array([[7, 7, 3, 5]])
    alone = by_full_passes(model, ids[:, 2:], 6, 3.0, temperature=0.0)
    for padding in range(13):
        ids[:, :2] = padding
        mask = np.array([[0, 0, 1, 1]])
        computed = generated(
            model, ids, max_new_tokens=6, repetition_penalty=3.0, attention_mask=mask
        )
        np.testing.assert_array_equal(computed, alone)


@pytest.mark.parametrize("name", ["gqa", "window", "llama3"])
def test_left_padded_batch_is_each_prompt_alone(name, rng):
    config = CONFIGS[name]
    model = model_of(config, random_weights(config))
    ids = rng.integers(config.vocab_size, size=(3, 6))
    starts = [0, 2, 5]
    mask = np.arange(6) >= np.array(starts)[:, None]
    batch = generated(model, ids, max_new_tokens=7, attention_mask=mask)
    for row, start in enumerate(starts):
        alone = by_full_passes(model, ids[row : row + 1, start:], 7, temperature=0.0)
        np.testing.assert_array_equal(batch[row], alone[0])


@given(seed=st.integers(0, 2**32 - 1), window=st.integers(1, 4), chunk=st.integers(1, 4))
def test_ring_is_the_full_cache(seed, window, chunk):
    rng = np.random.default_rng(seed)
    config = replace(GQA, sliding_window=window)
    model = model_of(config, random_weights(config, seed))
    ids = rng.integers(13, size=(2, 7))
    mask = np.arange(7) >= np.array([[0], [3]])
    plain = KVCache.create(model, 2, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "CHUNK", chunk)
        ring = generated(model, ids, max_new_tokens=5, attention_mask=mask)
    expected = generated(model, ids, max_new_tokens=5, attention_mask=mask, cache=plain)
    np.testing.assert_array_equal(ring, expected)
    alone = by_full_passes(model, ids[1:, 3:], 5, temperature=0.0)
    np.testing.assert_array_equal(ring[1:], alone)


def test_long_prompts_of_a_window_need_no_long_cache(monkeypatch, rng):
    config = replace(GQA, sliding_window=3, num_hidden_layers=1)
    model = model_of(config, random_weights(config))
    made = []
    create = KVCache.create
    monkeypatch.setattr(generation, "CHUNK", 4)
    monkeypatch.setattr(
        KVCache, "create", lambda *args, **kwargs: made.append(create(*args, **kwargs)) or made[-1]
    )
    list(generate(model, rng.integers(13, size=(1, 50)), max_new_tokens=2))
    assert [cache.capacity for cache in made] == [6]


def test_continues_from_a_cache(rng):
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(2, 6))
    expected = generated(model, ids, max_new_tokens=5)
    cache = forward(model, ids[:, :4], cache=KVCache.create(model, 2, 11)).cache
    np.testing.assert_array_equal(
        generated(model, ids[:, 4:], max_new_tokens=5, cache=cache), expected
    )


@pytest.mark.parametrize("count", [1, 5])
def test_number_of_tokens(count, rng):
    model = model_of(GQA, random_weights(GQA))
    assert generated(model, rng.integers(13, size=(2, 3)), max_new_tokens=count).shape == (2, count)


def test_on_every_library(backend, rng):
    weights = random_weights(GQA, dtype=np.float32)
    ids = rng.integers(13, size=(2, 4))
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "repetition_penalty": 1.5, "eos_token_id": 12}
    steps = generate(
        model_of(GQA, weights, backend.array),
        backend.array(ids),
        attention_mask=backend.array(mask),
        **options,
    )
    steps = list(steps)
    assert all(backend.holds(step) for step in steps)
    expected = generated(
        model_of(GQA, {name: a.astype(np.float64) for name, a in weights.items()}),
        ids,
        attention_mask=mask,
        **options,
    )
    np.testing.assert_array_equal(np.stack([to_numpy(s) for s in steps], axis=1), expected)


def test_options_may_be_scalars_of_numpy(xp, rng):
    """None widens the logits, or overflows: 12 tokens and 250 more are more than 8 bits count."""
    weights = random_weights(GQA, dtype=np.float32)
    model = model_of(GQA, weights, xp.asarray)
    ids = xp.asarray(rng.integers(13, size=(2, 12)))
    steps = generate(
        model, ids, max_new_tokens=np.uint8(250), repetition_penalty=np.float32(1.5), rng=np.int8(3)
    )
    plain = generate(model, ids, max_new_tokens=250, repetition_penalty=1.5, rng=3)
    for _ in range(3):
        np.testing.assert_array_equal(to_numpy(next(steps)), to_numpy(next(plain)))


IDS = np.array([[1, 2, 3], [4, 5, 6]])
ONES = np.ones((2, 3), int)


@pytest.mark.parametrize(
    ("ids", "options", "error", "message"),
    [
        (IDS.tolist(), {}, TypeError, "input_ids: expected an array"),
        (IDS[0], {}, ValueError, r"input_ids: expected shape \[B, S\] with at least one token, "),
        (IDS[:, :0], {}, ValueError, r"input_ids: expected shape .* got \[2, 0\]"),
        (IDS * 1.0, {}, TypeError, "input_ids: expected an integer dtype, got float64"),
        (IDS + 10, {}, ValueError, "input_ids: expected ids from 0 to 12, got 11 to 16"),
        (IDS, {"max_new_tokens": 0}, ValueError, "max_new_tokens: expected a positive .*, got 0"),
        (IDS, {"max_new_tokens": 2.5}, ValueError, r"max_new_tokens: expected .*, got 2\.5"),
        (IDS, {"max_new_tokens": True}, ValueError, "max_new_tokens: expected .*, got True"),
        (IDS, {"max_new_tokens": None}, ValueError, "max_new_tokens: expected .*, got None"),
        (IDS, {"temperature": -1.0}, ValueError, "temperature: expected a finite number"),
        (IDS, {"temperature": None}, TypeError, "temperature: expected a number, got NoneType"),
        (IDS, {"top_k": 0}, ValueError, "top_k: expected a positive integer"),
        (IDS, {"rng": "a"}, TypeError, "rng: expected a numpy.random.Generator, .*, got 'a'"),
        (IDS, {"top_p": 2.0}, ValueError, "top_p: expected more than 0 and at most 1"),
        (IDS, {"min_p": 2.0}, ValueError, "min_p: expected 0 to 1"),
        (IDS, {"repetition_penalty": 0.0}, ValueError, "repetition_penalty: .* than 0, got 0.0"),
        (
            IDS,
            {"repetition_penalty": None},
            TypeError,
            "repetition_penalty: expected a number, got NoneType",
        ),
        (
            IDS,
            {"attention_mask": np.array([[1, 1, 0], [1, 1, 1]])},
            ValueError,
            "attention_mask: expected prompts padded before their first token",
        ),
        (
            IDS,
            {"attention_mask": np.ones((2, 5), int)},
            ValueError,
            r"attention_mask: expected shape \[2, 3\] of input_ids, got \[2, 5\]",
        ),
        (IDS, {"attention_mask": ONES[0]}, ValueError, r"attention_mask: .* got \[3\]"),
        (
            IDS,
            {"attention_mask": ONES * 1.0},
            TypeError,
            "attention_mask: expected bool or integers",
        ),
        (
            IDS,
            {"attention_mask": array_api_strict.ones((2, 3), dtype=array_api_strict.bool)},
            TypeError,
            "attention_mask: expected an array of the same library",
        ),
        (
            IDS,
            {"cache": KVCache.create(GQA, 2, 6, like=np.zeros(0))},
            ValueError,
            "cache: expected room for 7 tokens, got max_len = 6",
        ),
        (
            IDS,
            {"cache": KVCache.create(GQA, 1, 9, like=np.zeros(0))},
            ValueError,
            "cache: expected keys of shape",
        ),
        *(
            (IDS, {"eos_token_id": end}, ValueError, "eos_token_id: expected token ids, zero or ")
            for end in (-1, 3.0, "3", True)
        ),
    ],
)
def test_refuses_at_the_call(ids, options, error, message):
    """Before the first step is asked for."""
    model = model_of(GQA, random_weights(GQA))
    with pytest.raises(error, match=message):
        generate(model, ids, **{"max_new_tokens": 4} | options)
