"""Generation on the device: the tokens of the definition, drawn ahead of those that were read."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from llama_layers import KVCache, forward, generate
from llama_layers.backends.cupy import decode, generation
from llama_layers.model.generate import Start
from llama_layers.model.sampling import Sampling
from tests.support import cupy_stand_in as stand_in
from tests.support.emulator import needs_compiler
from tests.support.installed import on_device, stand_in_alone
from tests.support.random_models import CONFIGS, PLAIN, model_of, random_weights

pytestmark = [needs_compiler, pytest.mark.usefixtures("cupy")]

IDS = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
PADDED = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1]])


def pair(config, dtype=np.float32):
    """The same random model in main memory and on the device."""
    weights = random_weights(config, 0, dtype)
    return model_of(config, weights), model_of(config, weights, on_device)


def generated(model, ids, **options):
    """All tokens [steps, B], of as many steps as there are."""
    on_cpu = isinstance(model.weights.norm, np.ndarray)
    place = np.asarray if on_cpu else on_device
    options = {"max_new_tokens": 9, "eos_token_id": (), **options}
    if (mask := options.pop("mask", None)) is not None:
        options["attention_mask"] = place(mask)
    steps = list(generate(model, place(ids), **options))
    assert {step.dtype for step in steps} == {np.dtype(np.int64)}
    return np.array([step if on_cpu else step.get() for step in steps])


def steps_started():
    """How many steps a graph for all of a step was asked for."""
    return mock.patch.object(generation.TokenStep, "start", autospec=True,
                             side_effect=generation.TokenStep.start)  # fmt: skip


OPTIONS = ({}, {"temperature": 0.7, "rng": 3}, {"temperature": 2.0, "rng": 4})


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_definition_s_tokens(kind, mask):
    on_cpu, on_gpu = pair(CONFIGS[kind])
    options = OPTIONS[(list(CONFIGS).index(kind) + (mask is None)) % 3]
    expected = generated(on_cpu, IDS, mask=mask, **options)
    # A window on every layer makes the cache a ring, which forgets padding step by step.
    by_steps = kind in PLAIN and kind != "dynamic"
    by_steps = by_steps and not (mask is not None and kind.startswith("window"))
    for seed in (0, 1):
        stand_in.SEED = seed
        with steps_started() as started:
            found = generated(on_gpu, IDS, mask=mask, **options)
        np.testing.assert_array_equal(found, expected)
        assert started.call_count == (8 if by_steps else 0)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5},
     {"temperature": 1.0, "min_p": 0.2}, {"repetition_penalty": 1.5}],
    ids=str,
)  # fmt: skip
def test_what_is_drawn_by_the_definition(options):
    on_cpu, on_gpu = pair(CONFIGS["gqa"])
    expected = generated(on_cpu, IDS, rng=1, **options)
    with steps_started() as started:
        np.testing.assert_array_equal(generated(on_gpu, IDS, rng=1, **options), expected)
    assert not started.called


@pytest.mark.parametrize("of_layers", [False, True])
def test_hooks_leave_it_to_the_definition(of_layers):
    """A tap also leaves each layer to it; a processor and log-probabilities do not."""
    on_cpu, on_gpu = pair(CONFIGS["gqa"])
    hooks = {"logits_processor": lambda ids, logits: -logits}
    if of_layers:
        hooks = {"tap": {"model.layers.1": lambda name, x: -x}}
    for options in (hooks, {**hooks, "temperature": 0.9, "rng": 2}):
        expected = generated(on_cpu, IDS, **options)
        with steps_started() as started:
            np.testing.assert_array_equal(generated(on_gpu, IDS, **options), expected)
        assert not started.called
    options = {"max_new_tokens": 5, "return_logprobs": True, "eos_token_id": ()}
    with steps_started() as started:
        found = list(generate(on_gpu, on_device(IDS), **options))
    assert not started.called
    for step, expected in zip(found, generate(on_cpu, IDS, **options), strict=True):
        np.testing.assert_array_equal(step.ids.get(), expected.ids)
        np.testing.assert_allclose(step.logprobs.get(), expected.logprobs, rtol=0, atol=1e-5)


def test_one_token_more_or_none():
    on_cpu, on_gpu = pair(CONFIGS["gqa"])
    for count in (1, 2):
        expected = generated(on_cpu, IDS, max_new_tokens=count)
        np.testing.assert_array_equal(generated(on_gpu, IDS, max_new_tokens=count), expected)


@pytest.mark.parametrize("early", [False, True])
def test_sequences_end_as_by_the_definition(early):
    """Whether the device is late, or has the tokens of the next step while these are still read."""
    on_cpu, on_gpu = pair(replace(CONFIGS["gqa"], pad_token_id=12))
    free = generated(on_cpu, IDS, max_new_tokens=12)
    stand_in.Stream.eager = early
    for ends in ({int(free[4, 0])}, {int(free[4, 0]), int(free[2, 1]), int(free[6, 2])}):
        options = {"eos_token_id": tuple(ends), "max_new_tokens": 12}
        expected = generated(on_cpu, IDS, **options)
        np.testing.assert_array_equal(generated(on_gpu, IDS, **options), expected)
    assert len(expected) < 12


def test_padding_of_a_branch_that_was_left():
    """Generation goes on from before some padding, which is still in the memory of the cache."""
    found = []
    on_cpu, on_gpu = pair(CONFIGS["gqa"])
    for model, place in ((on_cpu, np.asarray), (on_gpu, on_device)):
        ones, none = place(np.ones((3, 3), int)), place(np.zeros((3, 3), int))
        empty = KVCache.create(model, 3, 16)
        cache = forward(model, place(IDS), cache=empty, attention_mask=ones).cache
        forward(model, place(IDS), cache=cache, attention_mask=none)
        found.append(generated(model, IDS[:, :1], cache=cache))
    np.testing.assert_array_equal(*found)


def test_a_cache_that_is_given():
    on_cpu, on_gpu = pair(CONFIGS["gqa"])
    rest = np.array([[3, 1], [2, 2], [0, 5]])
    found = []
    for model, place in ((on_cpu, np.asarray), (on_gpu, on_device)):
        cache = forward(model, place(IDS), cache=KVCache.create(model, 3, 16)).cache
        found.append(generated(model, rest, cache=cache))
    np.testing.assert_array_equal(*found)


def test_the_generator_is_left_as_the_definition_leaves_it():
    on_cpu, on_gpu = pair(CONFIGS["gqa"])
    left = []
    for model in (on_cpu, on_gpu):
        place = np.asarray if model is on_cpu else on_device
        rng = np.random.default_rng(5)
        steps = generate(model, place(IDS), max_new_tokens=9, temperature=1.0, rng=rng)
        for _ in range(4):
            next(steps)
        steps.close()
        left.append(rng.random())
    assert left[0] == left[1]


@stand_in_alone
def test_the_device_is_one_token_ahead():
    """The next step is asked for before the tokens of this one are waited for, and no other."""
    _, on_gpu = pair(CONFIGS["gqa"])
    seen = []
    start, wait = generation.TokenStep.start, stand_in.Event.synchronize
    with (
        mock.patch.object(generation.TokenStep, "start",
                          lambda self: (seen.append("start"), start(self))[1]),
        mock.patch.object(stand_in.Event, "synchronize",
                          lambda self: (seen.append("wait"), wait(self))[1]),
    ):  # fmt: skip
        steps = generate(on_gpu, on_device(IDS), max_new_tokens=5, eos_token_id=())
        next(steps)
        assert seen == []
        next(steps)
        assert seen == ["start", "start", "wait"]
        next(steps)
        assert seen[3:] == ["start", "wait"]
        next(steps)
        assert seen[5:] == ["start", "wait"]
        next(steps)
        assert seen[7:] == ["wait"]


@stand_in_alone
def test_tokens_in_main_memory_are_those_on_the_device():
    _, on_gpu = pair(CONFIGS["gqa"])
    cache = KVCache.create(on_gpu, 3, 16)
    output = forward(on_gpu, on_device(IDS), cache=cache, last_only=True)
    sampling = Sampling(3.0, None, None, None, np.random.default_rng(0))
    start = Start(on_gpu, output.logits[:, 0, :], output.cache, 6, sampling)
    steps = list(generation.decode_loop(stand_in, start))
    for ids, drawn, _ in steps:  # now, since get waits for all that was asked for
        np.testing.assert_array_equal(drawn, ids.get())


@stand_in_alone
def test_tokens_are_read_without_waiting_for_the_step_that_runs():
    """Only by the event, of which the copy comes before: nothing else waits for the stream."""
    _, on_gpu = pair(CONFIGS["gqa"])
    steps = generate(on_gpu, on_device(IDS), max_new_tokens=9, eos_token_id=())
    next(steps)
    next(steps)
    waits = mock.Mock(side_effect=AssertionError("waited for the whole stream"))
    with mock.patch.object(stand_in.Stream, "synchronize", waits):
        for _ in range(4):
            next(steps)
    steps.close()


def test_the_first_of_the_largest_wins():
    """Rows of the head that are the same give the same logit, of which the first is taken."""
    config = CONFIGS["gqa"]
    weights = random_weights(config, 0, np.float32)
    weights["lm_head.weight"][1::2] = weights["lm_head.weight"][0::2][:6]
    found = [generated(model_of(config, weights, place), IDS) for place in (np.asarray, on_device)]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[1] % 2 == 0).all()


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "rng": 0}], ids=str)
def test_nan_is_refused(options):
    _, on_gpu = pair(CONFIGS["gqa"])
    steps = generate(on_gpu, on_device(IDS), max_new_tokens=9, eos_token_id=(), **options)
    next(steps)
    on_gpu.weights.lm_head[5, :] = np.nan
    with pytest.raises(ValueError, match="logits: expected numbers, got NaN"):
        list(steps)


@stand_in_alone
def test_a_generation_that_is_left_takes_its_memory_along():
    _, on_gpu = pair(CONFIGS["gqa"])
    steps = generate(on_gpu, on_device(IDS), max_new_tokens=9, eos_token_id=())
    next(steps)
    next(steps)
    assert not stand_in.get_current_stream().done  # it is one ahead
    del steps
    assert stand_in.get_current_stream().done
    stand_in.Device().synchronize()  # raises if a graph would run on memory that was freed
    assert not decode._STEPS.get(on_gpu.weights)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_16_bits(dtype):
    """The likeliest token by float32 logits is one of the likeliest by the definition's."""
    _, on_gpu = pair(CONFIGS["gqa"], dtype)
    with steps_started() as started:
        tokens = generated(on_gpu, IDS)
    assert started.call_count == 8
    exact = model_of(CONFIGS["gqa"], random_weights(CONFIGS["gqa"], 0, dtype))
    whole = np.concatenate([IDS, tokens.T], axis=1)
    logits = forward(exact, whole[:, :-1]).logits[:, 2:].astype(np.float64)
    chosen = np.take_along_axis(logits, tokens.T[..., None], axis=2)[..., 0]
    roundoff = 2.0**-8 if dtype is ml_dtypes.bfloat16 else 2.0**-11
    assert (chosen >= logits.max(axis=2) - 32 * roundoff * abs(logits).max()).all()
