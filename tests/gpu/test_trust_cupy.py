"""Bodies for a GPU are tried before they serve; CuPy alone serves where all of them are wrong."""

from __future__ import annotations

import warnings
from unittest import mock

import numpy as np
import pytest

from llama_layers import BackendError, KVCache, Mask, forward, generate, trial
from llama_layers.arrays.dispatch import routes
from llama_layers.backends.cupy import BODIES, ROUTES, compile, cublas
from llama_layers.backends.trust import Body, settled, trusted
from llama_layers.testing import assert_same_bits
from llama_layers.trial import try_body
from llama_layers.trial.place import Place
from tests.support.emulator import needs_compiler
from tests.support.installed import on_device, stand_in_alone
from tests.support.random_models import CONFIGS, model_of, random_weights
from tests.support.watched_bodies import (
    DEFINITIONS,
    forget,
    inputs,
    one_warning,
    only_for,
    planted,
    shuffled,
    spoiled,
    without_nan,
    without_tail,
)

pytestmark = [needs_compiler, stand_in_alone, pytest.mark.usefixtures("cupy", "watched")]


def there(value):
    if isinstance(value, Mask):
        return Mask(there(value.queries), there(value.keys), value.window)
    return on_device(value) if isinstance(value, np.ndarray) else value


def on_host(spoil):
    """The change of a result, made in main memory."""

    def change(y, xp, *arguments):
        numbers = [a.get() if hasattr(a, "get") else a for a in arguments]
        return on_device(spoil(y.get(), np, *numbers))

    return change


PLANTS = [
    ("CUDA", "attend", "tails", without_tail),
    ("CUDA", "attend", "bfloat16", only_for("bfloat16", shuffled)),
    ("CUDA", "gate_with_silu", "NaN", without_nan),
    ("CUDA", "linear_2d", "float16", only_for("float16", shuffled)),
    ("CUDA", "normalise", "tails", without_tail),
    ("CUDA", "rotate", "NaN", without_nan),
    ("cuBLAS", "linear_2d", "bfloat16", only_for("bfloat16", shuffled)),
    ("CuPy", "linear_2d", "float64", only_for("float64", shuffled)),
]


@pytest.mark.parametrize(
    ("route", "name", "spoil"),
    [(route, name, spoil) for route, name, _, spoil in PLANTS],
    ids=[f"{route} {name}: {what}" for route, name, what, _ in PLANTS],
)
def test_a_wrong_body_is_bypassed(route, name, spoil):
    wrong = spoiled(ROUTES[route][name].function, on_host(spoil))
    arguments = [there(value) for value in inputs(name)]
    xp = Place.of("cupy").xp
    with planted("cupy", route, name, wrong), one_warning(f"{name} by {route} is not used on"):
        found = [DEFINITIONS[name](xp, *arguments) for _ in range(2)]
    for y in found:
        assert_same_bits(y, DEFINITIONS[name].__wrapped__(xp, *arguments))


def pair():
    """The same random model in main memory and on the device."""
    weights = random_weights(CONFIGS["gqa"], 0, np.float32)
    return model_of(CONFIGS["gqa"], weights), model_of(CONFIGS["gqa"], weights, on_device)


IDS = np.array([[1, 2, 3], [4, 5, 6]])


def last_logits(model, place):
    cache = forward(model, place(IDS), cache=KVCache.create(model, 2, 8)).cache
    return [forward(model, place(IDS[:, :1]), cache=cache).logits for _ in range(2)]


def test_wrong_layers():
    on_cpu, on_gpu = pair()
    wrong = spoiled(BODIES["decoder_layers"], lambda y, *_: (y[0] * np.float32(1.001), y[1]))
    warned = one_warning("decoder_layers by CUDA is not used on stand-in (CuPy")
    with planted("cupy", "CUDA", "decoder_layers", wrong), warned:
        found = last_logits(on_gpu, on_device)
    for y, expected in zip(found, last_logits(on_cpu, np.asarray), strict=True):
        np.testing.assert_allclose(y.get(), expected, rtol=1e-4, atol=1e-5)


def tokens(model, place, **options):
    steps = generate(model, place(IDS), max_new_tokens=6, eos_token_id=(), rng=3, **options)
    return np.array([step if place is np.asarray else step.get() for step in steps])


def one_further(steps, *_):
    for ids, drawn in steps:
        yield (ids + 1) % 13, (drawn + 1) % 13


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_wrong_tokens(temperature):
    on_cpu, on_gpu = pair()
    wrong = spoiled(BODIES["decode_loop"], one_further)
    with planted("cupy", "CUDA", "decode_loop", wrong), one_warning("decode_loop by CUDA"):
        found = tokens(on_gpu, on_device, temperature=temperature)
    np.testing.assert_array_equal(found, tokens(on_cpu, np.asarray, temperature=temperature))


def test_uniform_numbers_of_another_order():
    """Only drawn tokens tell, not the likeliest."""

    def mirrored(self, model, cache, uniforms, temperature):
        return original(self, model, cache, 1 - uniforms, temperature)

    from llama_layers.backends.cupy.generation import TokenStep

    original = TokenStep.__init__
    with mock.patch.object(TokenStep, "__init__", mirrored):
        result = try_body(Body("cupy", "CUDA", "decode_loop", BODIES["decode_loop"]))
    assert not result.passed


def test_a_kernel_that_does_not_compile(monkeypatch):
    monkeypatch.setattr(compile, "text", lambda source: "no CUDA")
    compile.module.cache_clear()
    compile._kernel.cache_clear()
    arguments = [there(value) for value in inputs("normalise")]
    xp = Place.of("cupy").xp
    body = BODIES["normalise"]
    with planted("cupy", "CUDA", "normalise", body), one_warning("normalise by CUDA is not used"):
        y = DEFINITIONS["normalise"](xp, *arguments)
    assert_same_bits(y, DEFINITIONS["normalise"].__wrapped__(xp, *arguments))


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route, offers in ROUTES.items() for name in offers]
)
def test_the_right_ones_pass(route, name):
    assert try_body(ROUTES[route][name]).passed


def test_without_any_body_cupy_computes_all():
    """A prompt, single tokens and drawn ones, by CuPy's own operations."""
    on_cpu, on_gpu = pair()
    raising = {
        route: {name: mock.Mock(side_effect=RuntimeError("no GPU of ours"), takes=None)
                for name in offers}
        for route, offers in ROUTES.items()
    }  # fmt: skip
    launched = mock.patch.object(compile, "module", side_effect=AssertionError("a kernel of ours"))
    called = mock.patch.object(cublas, "_call", side_effect=AssertionError("cuBLAS"))
    with mock.patch.dict(routes("cupy"), trusted("cupy", **raising), clear=True), launched, called:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = last_logits(on_gpu, on_device)
            found = tokens(on_gpu, on_device, temperature=0.7)
        assert not any(settled.values())
    assert len(caught) == sum(map(len, ROUTES.values()))
    for y, expected in zip(logits, last_logits(on_cpu, np.asarray), strict=True):
        np.testing.assert_allclose(y.get(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found, tokens(on_cpu, np.asarray, temperature=0.7))


def test_another_gpu_or_driver_has_another_result(cupy, monkeypatch):
    xp = Place.of("cupy").xp
    arguments = [there(value) for value in inputs("rotate")]
    tried = mock.patch.object(trial, "try_body", side_effect=trial.try_body)
    with tried as tries, planted("cupy", "CUDA", "rotate", BODIES["rotate"]):
        DEFINITIONS["rotate"](xp, *arguments)
        forget()
        DEFINITIONS["rotate"](xp, *arguments)
        assert tries.call_count == 1
        monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 13010)
        forget()
        DEFINITIONS["rotate"](xp, *arguments)
        assert tries.call_count == 2


@pytest.mark.parametrize(
    ("route", "name"),
    [("CUDA", "attend"), ("CUDA", "linear_2d"), ("cuBLAS", "linear_2d"), ("CUDA", "decode_loop")],
)
def test_tf32_where_it_was_asked_for_is_no_fault(monkeypatch, route, name):
    monkeypatch.setenv("CUPY_TF32", "1")
    assert try_body(ROUTES[route][name]).passed


def test_nothing_is_tried_in_a_capture(cupy):
    xp = Place.of("cupy").xp
    arguments = [there(value) for value in inputs("rotate")]
    body = BODIES["rotate"]
    with planted("cupy", "CUDA", "rotate", body), cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(
            BackendError, match=r"rotate by CUDA was not tried .* run it once before"
        ):
            DEFINITIONS["rotate"](xp, *arguments)
        stream.end_capture()
        assert body not in settled
        DEFINITIONS["rotate"](xp, *arguments)
    assert settled[body]
