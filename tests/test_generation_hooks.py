"""Taps, logits processors and log-probabilities in `generate`."""

from __future__ import annotations

from dataclasses import replace

import array_api_strict
import numpy as np
import pytest

from llama_layers import KVCache, forward, generate, sample
from llama_layers.arrays.transfer import to_numpy
from llama_layers.layers.tap import untouched
from llama_layers.model import generate as generation
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights
from tests.test_generation import by_full_passes, generated
from tests.test_generation_ends import uneven


def exact_log_softmax(logits):
    wide = logits.astype(np.longdouble)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_a_processor_comes_after_the_penalty_and_before_the_temperature(rng):
    """By hand: full passes, Keskar's penalty, a bias on each logit, and then `sample`."""
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(2, 4))
    bias = rng.standard_normal(13)
    options = {"temperature": 0.3, "top_k": 5}
    rows, expected = ids.tolist(), []
    draws = np.random.default_rng(3)
    for _ in range(8):
        logits = np.array([forward(model, np.array([row])).logits[0, -1] for row in rows])
        for row, own in zip(rows, logits, strict=True):
            used = list(set(row))
            own[used] = np.where(own[used] > 0, own[used] / 1.7, own[used] * 1.7)
        new = sample(logits + bias, **options, rng=draws)
        expected.append(new)
        for row, token in zip(rows, new, strict=True):
            row.append(int(token))
    computed = generated(
        model, ids, max_new_tokens=8, repetition_penalty=1.7, rng=3, **options,
        logits_processor=lambda so_far, logits: logits + bias,
    )  # fmt: skip
    np.testing.assert_array_equal(computed, np.stack(expected, axis=1))
    assert (computed != generated(model, ids, max_new_tokens=8, repetition_penalty=1.7, rng=3,
                                  **options)).any()  # fmt: skip


def test_a_processor_sees_all_ids_so_far(backend, rng):
    config = replace(GQA, pad_token_id=12)
    _, ids, _, eos, _ = uneven(rng)
    weights = random_weights(config, dtype=np.float32)
    model = model_of(config, weights, backend.array)
    seen = []

    def note(so_far, logits):
        assert backend.holds(so_far)
        assert logits.shape == (4, 13)
        seen.append(to_numpy(so_far))
        return logits

    steps = generate(
        model, backend.array(ids), max_new_tokens=12, eos_token_id=eos, logits_processor=note
    )
    found = np.stack([to_numpy(step) for step in steps], axis=1)
    assert (found == 12).any()  # padding, where a row had ended
    whole = np.concatenate([ids, found], axis=1)
    assert len(seen) == found.shape[1]
    for step, so_far in enumerate(seen):
        assert so_far.dtype.kind == "i"
        np.testing.assert_array_equal(so_far, whole[:, : 3 + step])


def test_a_processor_constrains(rng):
    """Ids of the prompt may be of a dtype that the new ones do not fit in."""
    config = replace(GQA, vocab_size=300)
    model = model_of(config, random_weights(config))

    def even_then_next(so_far, logits):
        """An even id, and then the one after it."""
        last, ids = so_far[:, -1:], np.arange(300)
        allowed = np.where(last % 2 == 1, ids % 2 == 0, ids == last + 1) & (ids >= 280)
        return np.where(allowed, logits, -np.inf)

    prompt = np.array([[1], [3]], np.uint8)
    found = generated(
        model, prompt, max_new_tokens=6, temperature=5.0, rng=0, logits_processor=even_then_next
    )
    assert (found >= 280).all()
    assert (found[:, ::2] % 2 == 0).all()
    np.testing.assert_array_equal(found[:, 1::2], found[:, ::2] + 1)


@pytest.mark.parametrize("kind", ["gqa", "window"])
@pytest.mark.parametrize("in_place", [False, True])
def test_logprobs_are_those_of_the_model_itself(kind, in_place, rng):
    """Not of what penalty, processor, temperature and filters make of its logits."""
    config = CONFIGS[kind]
    model = model_of(config, random_weights(config))
    ids = rng.integers(13, size=(3, 4))

    def ban(so_far, logits):
        logits = logits if in_place else logits.copy()
        logits[:, 2:5] = -np.inf
        return logits

    options = {
        "max_new_tokens": 7, "temperature": 0.5, "top_k": 4, "repetition_penalty": 1.5, "rng": 1,
        "logits_processor": ban, "eos_token_id": (),
    }  # fmt: skip
    steps = list(generate(model, ids, **options, return_logprobs=True))
    tokens = np.stack([step.ids for step in steps], axis=1)
    np.testing.assert_array_equal(tokens, generated(model, ids, **options))
    whole = np.concatenate([ids, tokens], axis=1)
    own = exact_log_softmax(forward(model, whole).logits)[:, 3:-1]
    expected = np.take_along_axis(own, tokens[..., None], axis=-1)[..., 0]
    computed = np.stack([logprobs for _, logprobs in steps], axis=1)
    assert computed.dtype == np.float64
    np.testing.assert_allclose(computed, expected.astype(float), rtol=0, atol=1e-12)


def test_logprobs_of_padding_are_0(backend, rng):
    _, ids, _, eos, _ = uneven(rng)
    config = replace(GQA, pad_token_id=12)
    model = model_of(config, random_weights(config, dtype=np.float32), backend.array)
    options = {"max_new_tokens": 12, "eos_token_id": eos}
    steps = list(generate(model, backend.array(ids), **options, return_logprobs=True))
    tokens, logprobs = (
        np.stack([to_numpy(x) for x in column]) for column in zip(*steps, strict=True)
    )
    assert backend.holds(steps[0].logprobs)
    assert logprobs.dtype == np.float32
    ended = np.cumsum(tokens == eos, axis=0) - (tokens == eos) > 0
    assert ended.any()
    assert (logprobs[ended] == 0).all()
    assert (logprobs[~ended] < 0).all()


@pytest.mark.parametrize("kind", ["gqa", "window"])
def test_a_tap_is_in_every_pass(kind, rng):
    """Steering: a vector added after a layer, in the prompt and in each step."""
    config = CONFIGS[kind]
    weights = random_weights(config)
    model = model_of(config, weights)
    ids = rng.integers(13, size=(2, 4))
    vector = 3 * rng.standard_normal(10)
    tap = {"model.layers.0": lambda name, x: x + vector}

    def steered(model, ids, **options):
        return forward(model, ids, tap=tap, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.test_generation.forward", steered)
        expected = by_full_passes(model, ids, 8, temperature=0.0)
        patch.setattr(generation, "CHUNK", 2)
        computed = generated(model, ids, max_new_tokens=8, tap=tap)
    np.testing.assert_array_equal(computed, expected)
    assert (computed != generated(model, ids, max_new_tokens=8)).any()


def test_a_tap_counts_the_passes():
    model = model_of(GQA, random_weights(GQA))
    counts = []
    tap = {"probabilities": lambda name, p: counts.append(p.shape[2:]) or p}
    list(generate(model, np.array([[1, 2, 3]]), max_new_tokens=3, eos_token_id=(), tap=tap))
    assert counts == [(3, 3)] * 2 + [(1, 4)] * 2 + [(1, 5)] * 2


def test_nothing_is_made_for_them_when_they_are_not_asked_for(monkeypatch):
    starts = []
    loop = generation.decode_loop
    monkeypatch.setattr(
        generation, "decode_loop", lambda xp, start: starts.append(start) or loop(xp, start)
    )
    list(generate(model_of(GQA, random_weights(GQA)), np.array([[1]]), max_new_tokens=1))
    assert (starts[0].tap, starts[0].processor, starts[0].logprobs) == (untouched, None, False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tap": {"q_rop": untouched}}, ValueError, "tap: expected names of sites, got 'q_rop'"),
        ({"tap": 3}, TypeError, "tap: expected a callable, a mapping"),
        ({"logits_processor": 3}, TypeError, "logits_processor: expected a callable .*, got int"),
        ({"return_logprobs": 1}, TypeError, "return_logprobs: expected a bool, got int"),
    ],
)
def test_refuses_at_the_call(options, error, message):
    model = model_of(GQA, random_weights(GQA))
    cache = KVCache.create(model, 1, 9)
    with pytest.raises(error, match=message):
        generate(model, np.array([[1, 2]]), max_new_tokens=2, cache=cache, **options)
    assert not cache.keys[0].any()


@pytest.mark.parametrize(
    ("processor", "error", "message"),
    [
        (lambda ids, logits: None, ValueError, r"expected an array of .* \[1, 13\], .* NoneType"),
        (lambda ids, logits: logits[:, :5], ValueError, r"\[1, 13\], float32, got \[1, 5\], float"),
        (lambda ids, logits: logits.astype(float), ValueError, r"float32, got \[1, 13\], float64"),
        (lambda ids, logits: logits * np.nan, ValueError, "logits: expected numbers, got NaN"),
        (lambda ids, logits: logits - np.inf, ValueError, "logits_processor: .* got all -inf"),
    ],
)
def test_refuses_what_a_processor_returns(processor, error, message):
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    steps = generate(model, np.array([[1]]), max_new_tokens=2, logits_processor=processor)
    with pytest.raises(error, match=message):
        next(steps)


def test_refuses_arrays_of_another_library():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32), array_api_strict.asarray)
    steps = generate(
        model,
        array_api_strict.asarray([[1]]),
        max_new_tokens=2,
        logits_processor=lambda ids, logits: to_numpy(logits),
    )
    with pytest.raises(TypeError, match=r"logits_processor: .* same library as its argument, arr"):
        next(steps)
