"""Tokens through captured graphs: their numbers, and that nothing but the graph makes them."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_layers import KVCache, LlamaConfig, Mask, MLPWeights, forward
from llama_layers.arrays.transfer import to_numpy
from llama_layers.backends.cupy import ROUTES, decode
from llama_layers.config.families import SWITCHES
from llama_layers.layers.tensors import tensors_of
from llama_layers.testing import assert_same_bits
from tests.support import cupy_stand_in as stand_in
from tests.support.emulator import needs_compiler
from tests.support.installed import on_device, stand_in_alone, times
from tests.support.random_models import (
    CONFIGS,
    KINDS_AND_DTYPES,
    ONE_SWITCH,
    model_of,
    random_weights,
    run_in_chunks,
)

pytestmark = [needs_compiler, pytest.mark.usefixtures("cupy")]

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def models(config, dtype="float32"):
    """A random model in a dtype on the device, and one of the same numbers in float64."""
    weights = random_weights(config, 0, DTYPES[dtype])
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return model_of(config, weights, on_device), model_of(config, wide)


@contextmanager
def counted():
    """How often something is captured, and how often a step runs."""
    with (
        mock.patch.object(decode, "_captured", side_effect=decode._captured) as captures,
        mock.patch.object(decode.Replay, "__call__", autospec=True,
                          side_effect=decode.Replay.__call__) as runs,
    ):  # fmt: skip
        yield captures, runs


def decoded(model, ids, first, **options):
    """The logits of ids, so many at once and then each by a graph."""
    steps = ids.shape[1] - first + (first == 1)
    with counted() as (captures, runs):
        cuts = range(first, ids.shape[1])
        logits = run_in_chunks(model, ids, cuts, array=on_device, **options)
    assert runs.call_count == steps
    assert captures.call_count == 1
    return logits


def plain(model, ids, first, **options):
    """The same by the definitions."""
    cuts = range(first, ids.shape[1])
    array = np.asarray if isinstance(model.weights.norm, np.ndarray) else on_device
    with mock.patch.dict(ROUTES["CUDA"], clear=True), np.errstate(all="ignore"):
        return run_in_chunks(model, ids, cuts, array=array, **options)


def assert_as_exact(config, dtype, ids, first, keep=None, **options):
    """No farther from float64 than 4 times what the definition alone is, nor than 8 roundings."""
    model, exact = models(config, dtype)
    options["keep"] = keep
    kept = np.ones(ids.shape, bool) if keep is None else keep
    captured, alone, reference = (
        run(of, ids, first, **options)[kept].astype(np.float64)
        for run, of in ((decoded, model), (plain, model), (plain, exact))
    )
    allowed = 4 * abs(alone - reference).max() + 8 * ROUNDOFF[dtype] * abs(reference).max()
    assert abs(captured - reference).max() <= allowed


def random_ids(config, batch, count, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, count))


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_models(kind, dtype, data):
    config = CONFIGS[kind]
    batch = data.draw(st.integers(1, decode.launch.MAX_TOKENS))
    seed = data.draw(st.integers(0, 2**32))
    ids = random_ids(config, batch, 9, seed)
    starts = np.random.default_rng(seed).integers(0, 4, (batch, 1))
    keep = np.arange(9) >= starts if data.draw(st.booleans()) else None
    stand_in.SEED = seed
    assert_as_exact(config, dtype, ids, data.draw(st.integers(1, 6)), keep)


@pytest.mark.parametrize("kind", ["gqa", "some windows"])
@pytest.mark.parametrize("as_mask", [False, True])
def test_masks_of_callers_are_left_to_the_definition(kind, as_mask):
    """The graph hides what the cache says, and knows no other mask."""
    model, exact = models(CONFIGS[kind])
    ids = random_ids(model.config, 2, 9)
    rule = np.tri(9, dtype=bool) & (np.arange(9) != 2)
    results = []
    for of, array in ((model, on_device), (exact, np.asarray)):
        cache = forward(of, array(ids[:, :8]), cache=KVCache.create(of, 2, 9)).cache
        mask = array(rule[8:])
        if as_mask:
            keep = array(np.repeat(rule[8:], 2, axis=0))
            mask = Mask(array(np.array([8])), array(np.arange(9)), None, keep)
        with counted() as (_, runs):
            logits = forward(of, array(ids[:, 8:]), cache=cache, mask=mask).logits
        assert not runs.called
        results.append(to_numpy(logits).astype(np.float64))
    assert abs(results[0] - results[1]).max() <= 2e-5 * abs(results[1]).max()


@pytest.mark.parametrize(
    ("head_dim", "heads"),
    [
        *((head_dim, (4, 1)) for head_dim in (2, 6, 16, 64, 80, 128)),
        *((head_dim, heads) for head_dim in (6, 64) for heads in ((4, 4), (6, 1), (10, 2))),
    ],
)
def test_widths_and_groups(head_dim, heads):
    config = replace(
        CONFIGS["gqa"],
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        hidden_size=20,
        intermediate_size=26,
    )
    assert_as_exact(config, "float32", random_ids(config, 2, 7), 4)


@pytest.mark.parametrize("kind", ["gqa", "window"])
def test_a_long_context(kind):
    """More tokens than one block attends to; with a window, chunks in which all is hidden."""
    config = replace(CONFIGS[kind], max_position_embeddings=1024)
    config = replace(config, sliding_window=7) if kind == "window" else config
    assert_as_exact(config, "float32", random_ids(config, 2, 300), 297, max_len=400)


@pytest.mark.parametrize("padded", [False, True])
def test_a_ring(padded):
    config = replace(CONFIGS["window"], sliding_window=5)
    keep = np.arange(24) >= np.array([[0], [3]]) if padded else None
    assert_as_exact(config, "float32", random_ids(config, 2, 24), 3, keep, rolling=3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_batch(dtype):
    model, _ = models(CONFIGS["gqa"], dtype)
    ids = random_ids(model.config, decode.launch.MAX_TOKENS, 8)
    keep = np.arange(8) >= np.arange(decode.launch.MAX_TOKENS)[:, None] // 2
    # The tokens before the graph's come one by one too: products of many rows sum in other orders.
    whole = decoded(model, ids, 1, keep=keep)
    stand_in.SEED = 7
    for row in range(decode.launch.MAX_TOKENS):
        alone = decoded(model, ids[row : row + 1], 1, keep=keep[row : row + 1])
        assert_same_bits(whole[row, keep[row]], alone[0, keep[row]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_give_the_same_bits(cupy, dtype):
    """And those of the first run, which is no replay; in whatever order blocks and threads come."""
    model, _ = models(CONFIGS["biases"], dtype)
    ids = on_device(random_ids(model.config, 3, 6))
    cache = forward(model, ids[:, :5], cache=KVCache.create(model, 3, 8)).cache
    seen = []
    with counted() as (captures, _):
        for seed in range(times(cupy, 1000, 50)):
            stand_in.SEED = seed
            seen.append(forward(model, ids[:, 5:], cache=cache).logits.get())
    assert captures.call_count == 1
    for logits in seen[1:]:
        assert_same_bits(logits, seen[0])


@stand_in_alone
def test_a_token_allocates_and_captures_nothing_of_its_own():
    """The memory of a step is taken once; what `forward` gives back is all that is new."""
    model, _ = models(CONFIGS["gqa"])
    ids = on_device(random_ids(model.config, 2, 12))
    cache = forward(model, ids[:, :4], cache=KVCache.create(model, 2, 12)).cache
    step = decode.step_for(decode.LayersStep, model, cache)
    x = on_device(np.ones((2, 1, 10), np.float32))
    rope = tuple(on_device(np.ones((1, 2), np.float32)) for _ in range(2))
    step.run(x, rope, 4)
    taken = []
    allocate = stand_in.Memory.__init__
    with mock.patch.object(
        stand_in.Memory,
        "__init__",
        lambda self, size: (taken.append(size), allocate(self, size))[1],
    ):
        for length in range(4, 12):
            step.run(x, rope, length)
    assert taken == [x.nbytes] * 8


def test_several_caches_take_turns():
    model, _ = models(CONFIGS["gqa"])
    ids = random_ids(model.config, 2, 10)
    expected = [decoded(model, ids[i : i + 1], 1) for i in range(2)]
    caches, found = [KVCache.create(model, 1, 10) for _ in range(2)], [[], []]
    with counted() as (captures, _):
        for token in range(10):
            for i in range(2):
                fed = on_device(ids[i : i + 1, token : token + 1])
                output = forward(model, fed, cache=caches[i])
                caches[i] = output.cache
                found[i].append(output.logits.get())
    assert captures.call_count == 2
    for i in range(2):
        assert_same_bits(np.concatenate(found[i], axis=1)[:, 1:], expected[i][:, 1:])


def test_graphs_go_with_their_caches_and_models():
    model, _ = models(CONFIGS["gqa"])
    weights = model.weights
    ids = random_ids(model.config, 1, 4)
    for _ in range(3):
        decoded(model, ids, 1)
    gc.collect()
    assert len(decode._STEPS[weights]) == 1
    before = len(decode._STEPS)
    del model, weights
    gc.collect()
    assert len(decode._STEPS) == before - 1


def test_weights_changed_in_place_count_and_so_do_exchanged_layers():
    model, _ = models(CONFIGS["biases"])
    ids = random_ids(model.config, 1, 8)
    before = decoded(model, ids, 6)
    model.weights.layers[1].mlp.down_bias[:] += 1
    changed = decoded(model, ids, 6)
    assert abs(changed - before).max() > 1e-2
    np.testing.assert_allclose(changed, plain(model, ids, 6), rtol=1e-4, atol=1e-4)
    model.weights.layers[0] = model.weights.layers[1]
    exchanged = decoded(model, ids, 6)
    assert abs(exchanged - changed).max() > 1e-2
    np.testing.assert_allclose(exchanged, plain(model, ids, 6), rtol=1e-4, atol=1e-4)


def test_layers_exchanged_under_a_cache():
    model, _ = models(CONFIGS["gqa"])
    ids = on_device(random_ids(model.config, 1, 6))
    cache = forward(model, ids[:, :5], cache=KVCache.create(model, 1, 8)).cache
    before = forward(model, ids[:, 5:], cache=cache).logits.get()
    model.weights.layers.reverse()
    after = forward(model, ids[:, 5:], cache=cache).logits.get()
    assert abs(after - before).max() > 1e-2


def test_given_positions_count():
    model, exact = models(CONFIGS["gqa"])
    ids = random_ids(model.config, 2, 5)
    positions = np.array([[3], [6]])
    logits = []
    for one, array in ((model, on_device), (exact, np.asarray)):
        cache = forward(one, array(ids[:, :4]), cache=KVCache.create(one, 2, 8)).cache
        last = forward(one, array(ids[:, 4:]), cache=cache, positions=array(positions))
        logits.append(last.logits)
    np.testing.assert_allclose(logits[0].get(), logits[1], rtol=1e-4, atol=1e-4)


def test_scores_that_overflow_give_nan_and_what_padding_hides_gives_zeros():
    """As the definition does: a token of padding attends to nothing, and gets no NaN."""
    model, _ = models(CONFIGS["gqa"])
    ids = random_ids(model.config, 2, 8)
    keep = np.ones((2, 8), bool)
    keep[1, :6] = False
    own, other = (run(model, ids, 3, keep=keep) for run in (decoded, plain))
    np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)
    model.weights.layers[0].self_attn.qkv.fused[...] *= np.float32(1e25)
    own, other = (run(model, ids, 3) for run in (decoded, plain))
    assert not np.isfinite(own).all()
    np.testing.assert_array_equal(np.isnan(own), np.isnan(other))


def test_what_no_graph_is_made_for():
    """More sequences than the kernels take, float64, several tokens, a tap, mixed dtypes."""
    config = CONFIGS["gqa"]
    weights = random_weights(config, 0, np.float32)
    narrow = dict(weights)
    narrow["model.norm.weight"] = weights["model.norm.weight"].astype(np.float16)
    name = "model.layers.1.mlp.up_proj.weight"
    narrow[name] = weights[name].astype(np.float16)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    for arrays, batch, count, tap, fits in (
        (weights, decode.launch.MAX_TOKENS + 1, 1, None, False),
        (wide, 1, 1, None, False),
        (weights, 1, 2, None, True),
        (weights, 1, 1, lambda name, array: array, True),
        (narrow, 1, 1, None, False),
    ):
        model = model_of(config, arrays, on_device)
        ids = random_ids(config, batch, 3 + count)
        exact = model_of(config, wide)
        assert decode.fits(model, KVCache.create(model, batch, 8)) == fits
        logits = []
        with counted() as (_, runs):
            for one, array in ((model, on_device), (exact, np.asarray)):
                cache = forward(one, array(ids[:, :3]), cache=KVCache.create(one, batch, 8)).cache
                logits.append(forward(one, array(ids[:, 3:]), cache=cache, tap=tap).logits)
        assert runs.call_count == 0
        np.testing.assert_allclose(logits[0].get(), logits[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("switch", SWITCHES)
def test_no_graph_for_a_config_with_a_switch(switch):
    """A kernel that ignored it would take the config, unless its layers have other arrays."""
    config = ONE_SWITCH[switch]
    model = model_of(config, random_weights(config, 0, np.float32), on_device)
    cache = KVCache.create(model, 1, 8)
    assert not decode.fits(model, cache)
    with mock.patch.object(LlamaConfig, "switches", {}):
        assert decode.fits(model, cache) == (tensors_of(config) == tensors_of(CONFIGS["gqa"]))


@pytest.mark.parametrize("layer", [None, "a smaller MLP"])
def test_no_graph_for_layers_that_do_not_fit_the_config(layer):
    """The kernels would read beyond them."""
    model = model_of(CONFIGS["gqa"], random_weights(CONFIGS["gqa"], 0, np.float32), on_device)
    cache = KVCache.create(model, 1, 8)
    assert decode.fits(model, cache)
    if layer is not None:
        mlp = model.weights.layers[1].mlp
        down = on_device(np.ascontiguousarray(mlp.down_proj.get()[:, 1:]))
        smaller = MLPWeights(mlp.gate_proj[1:], mlp.up_proj[1:], down)
        layer = replace(model.weights.layers[1], mlp=smaller)
    model.weights.layers[1] = layer
    assert not decode.fits(model, cache)
