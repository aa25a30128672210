"""Compiled bodies are tried before they serve: NumPy's serve where they are wrong."""

from __future__ import annotations

from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from tests.support.compiled_route import compiled_first
from tests.support.random_models import CONFIGS, model_of, random_weights, run_in_chunks
from tests.support.watched_bodies import (
    DEFINITIONS,
    inputs,
    one_warning,
    only_for,
    shuffled,
    spoiled,
    without_nan,
    without_tail,
)

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

from llama_layers.arrays.dispatch import only
from llama_layers.backends import numba as fast
from llama_layers.backends.numba import decode
from llama_layers.backends.numba.kernels import gemm
from llama_layers.backends.numba.sizes import of_any_size, small
from llama_layers.backends.numpy import BODIES
from llama_layers.backends.trust import Body, settled
from llama_layers.testing import assert_same_bits
from llama_layers.trial import try_body

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TILES = gemm.problem("float32", "float32")


def of_many(spoil):
    """Change the results of many tokens only."""
    return lambda y, xp, x, *rest: spoil(y) if len(x) > 16 else y


PLANTS = [
    ("activations", "rounded", lambda y, *_: y.astype(BFLOAT16).astype(y.dtype)),
    ("attend", "tails", without_tail),
    ("gate_with_silu", "NaN", without_nan),
    ("linear_2d", "tails", without_tail),
    ("linear_2d", "bfloat16", only_for(BFLOAT16, shuffled)),
    ("linear_2d", "many tokens", of_many(lambda y: y * y.dtype.type(1.25))),
    ("normalise", "tails", without_tail),
    ("rotate", "NaN", without_nan),
]


@pytest.mark.parametrize(
    ("name", "spoil"), [p[::2] for p in PLANTS], ids=[f"{n}: {what}" for n, what, _ in PLANTS]
)
@pytest.mark.usefixtures("watched")
def test_numpy_serves_where_a_compiled_body_is_wrong(name, spoil):
    if TILES is not None and (name == "attend" or spoil is PLANTS[5][2]):
        pytest.skip(TILES)
    wrong = spoiled(fast.BODIES[name], spoil)
    with (
        mock.patch.dict(fast.BODIES, {name: wrong}),
        compiled_first(),
        of_any_size(),
        one_warning(f"{name} by numba is not used"),
    ):
        found = [DEFINITIONS[name](np, *inputs(name)) for _ in range(2)]
    for y in found:
        assert_same_bits(y, BODIES[name](np, *inputs(name)))
    assert settled == {wrong: False, BODIES[name]: True}


def decoded(model):
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9))
    return run_in_chunks(model, ids, [5, 7, 8])


def shifted(y, *_):
    x, cache = y
    return x * np.float32(1 + 2.0**-13), cache


def masks_of_one(run):
    """As if all layers had the mask of the first window."""

    def changed(x, config, plan, rope, masks, cache, caches):
        first = next(iter(masks.values()))
        return run(x, config, plan, rope, dict.fromkeys(masks, first), cache, caches)

    return changed


@pytest.mark.usefixtures("watched")
def test_the_definition_serves_where_all_layers_at_once_are_wrong():
    """Though they wrote to the cache."""
    model = model_of(CONFIGS["gqa"], random_weights(CONFIGS["gqa"], 0, np.float32))
    wrong = spoiled(fast.decoder_layers, shifted)
    warned = one_warning("decoder_layers by numba is not used")
    with mock.patch.dict(fast.BODIES, {"decoder_layers": wrong}), compiled_first(), warned:
        found = decoded(model)
    without = {name: body for name, body in fast.BODIES.items() if name != "decoder_layers"}
    with mock.patch.dict(fast.BODIES, without, clear=True), compiled_first():
        assert_same_bits(found, decoded(model))


@pytest.mark.parametrize(
    "change",
    [
        masks_of_one,
        lambda run: lambda x, *rest: run(np.float32(1 + 2.0**-13) * x, *rest),
        lambda run: lambda *a: np.nan_to_num(run(*a)),
        lambda run: lambda x, config, plan, rope, *a: run(x, config, plan, rope[::-1], *a),
    ],
    ids=["one mask for all layers", "small errors", "NaN", "cosines and sines"],
)
def test_what_is_wrong_in_all_layers(monkeypatch, change):
    monkeypatch.setattr(decode, "_run", change(decode._run))
    result = try_body(Body("numpy", "numba", "decoder_layers", fast.decoder_layers))
    assert not result.passed


@pytest.mark.usefixtures("watched")
def test_a_body_that_does_not_compile():
    from numba import njit

    @njit
    def kernel(x):
        return x.no_such_attribute

    def failing(xp, x, weight, eps):
        return kernel(x)

    x = inputs("normalise")
    with (
        mock.patch.dict(fast.BODIES, {"normalise": failing}),
        compiled_first(),
        one_warning("TypingError"),
    ):
        y = DEFINITIONS["normalise"](np, *x)
    assert_same_bits(y, BODIES["normalise"](np, *x))


@pytest.mark.parametrize("name", sorted(fast.BODIES))
def test_the_right_ones_pass(name):
    if TILES is not None and name == "attend":
        pytest.skip(TILES)
    assert try_body(Body("numpy", "numba", name, fast.BODIES[name])).passed


def test_of_any_size():
    assert small(1, 2)
    with of_any_size():
        assert not small(1, 2)
    assert small(1, 2)
    assert not small(2, 2)


def test_only_leaves_what_a_body_does_not_take_to_the_definition():
    """Small products are none of the compiled body's."""
    arguments = inputs("linear_2d")
    with only({"linear_2d": fast.linear_2d}), mock.patch.object(fast.linear, "_few") as kernel:
        y = DEFINITIONS["linear_2d"](np, *arguments)
    assert not kernel.called
    assert_same_bits(y, DEFINITIONS["linear_2d"].__wrapped__(np, *arguments))
