"""The compiled kernel of all layers: as exact as the definition, in every kind of cache."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.compiled_route import compiled_first
from tests.support.random_models import (
    CONFIGS,
    ONE_SWITCH,
    PLAIN,
    SAME_ARRAYS,
    model_of,
    random_weights,
    run_in_chunks,
)

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

from llama_layers import KVCache, LlamaConfig, forward
from llama_layers.backends.numba import decode, sizes
from llama_layers.backends.numba import linear as fast_linear
from llama_layers.backends.numpy import ROUTES
from llama_layers.backends.numpy.linear import linear_2d
from llama_layers.config.families import SWITCHES
from llama_layers.testing import assert_same_bits

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def decoded(model, ids, cuts, team=2, **options):
    """The logits of ids fed in chunks, all of them through the kernel of whole layers."""
    kernel = mock.Mock(side_effect=decode._run)
    with (
        mock.patch.object(decode, "_run", kernel),
        mock.patch.object(decode, "num_threads", return_value=team),
        mock.patch.object(fast_linear, "SMALL", 0),
        compiled_first(),
        np.errstate(all="ignore"),
    ):
        logits = run_in_chunks(model, ids, cuts, **options)
    assert kernel.call_count == len(cuts) + 1
    return logits


def plain(model, ids, cuts, **options):
    """The same without compiled bodies."""
    by_blas = {"NumPy": {"linear_2d": linear_2d}}
    with mock.patch.dict(ROUTES, by_blas, clear=True), np.errstate(all="ignore"):
        return run_in_chunks(model, ids, cuts, **options)


def models(config, dtype):
    """A random model in a dtype, and one of the same numbers in float64."""
    weights = random_weights(config, 0, DTYPES[dtype])
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    return model_of(config, weights), model_of(config, wide)


def assert_as_exact(model, exact, ids, cuts, keep=None, team=2, **options):
    """No farther from float64 than 4 times what NumPy alone is, nor than 8 roundings."""
    options["keep"] = keep
    kept = np.ones(ids.shape, bool) if keep is None else keep
    compiled, alone, reference = (
        logits[kept]
        for logits in (
            decoded(model, ids, cuts, team, **options),
            plain(model, ids, cuts, **options),
            plain(exact, ids, cuts, **options),
        )
    )
    allowed = 4 * abs(alone - reference).max() + 8 * 2.0**-24 * abs(reference).max()
    assert abs(compiled - reference).max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PLAIN)
@settings(max_examples=5)
@given(data=st.data())
def test_whole_layers(kind, dtype, data):
    config = CONFIGS[kind]
    batch, team = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = rng.integers(0, config.vocab_size, (batch, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11), max_size=5)) | {5, 8})
    keep = np.arange(12) >= rng.integers(0, 4, (batch, 1)) if data.draw(st.booleans()) else None
    assert_as_exact(*models(config, dtype), ids, cuts, keep, team)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in PLAIN])
def test_switches_that_the_kernel_does_not_know(kind):
    """Nothing is ignored: the layers are computed by others."""
    assert_left_to_others(*models(CONFIGS[kind], "float32"))


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_alone(switch):
    model, exact = models(ONE_SWITCH[switch], "float32")
    assert switch in model.config.switches
    assert_left_to_others(model, exact)


@pytest.mark.parametrize("switch", SAME_ARRAYS)
def test_a_switch_that_the_kernel_ignores_is_seen(switch):
    """The arrays of these layers do not give it away."""
    planted = mock.patch.object(LlamaConfig, "switches", {})
    with planted, pytest.raises((AssertionError, ValueError)):
        assert_left_to_others(*models(SAME_ARRAYS[switch], "float32"))


def assert_left_to_others(model, exact):
    ids = np.random.default_rng(0).integers(0, 13, (2, 12))
    with compiled_first():
        found = run_in_chunks(model, ids, [3, 10, 11])
    np.testing.assert_allclose(found, plain(exact, ids, [3, 10, 11]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 48, 64, 80])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 1), (10, 2)])
def test_widths_and_groups(head_dim, heads):
    """Heads that fill vectors, and some that do not; groups that fill a tile, or not."""
    config = replace(
        CONFIGS["gqa"],
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        hidden_size=20,
        intermediate_size=26,
    )
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))
    assert_as_exact(*models(config, "float32"), ids, [5, 8, 9])


def test_attention_in_chunks():
    """More tokens than a unit of attention takes; the last chunks may hold nothing allowed."""
    config = replace(CONFIGS["window"], sliding_window=7, max_position_embeddings=1024)
    count = 2 * sizes.CHUNK + 3
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, count))
    cuts = [*range(16, count - 1, 16), count - 1]
    for changed in (config, replace(CONFIGS["gqa"], max_position_embeddings=1024)):
        assert_as_exact(*models(changed, "float32"), ids, cuts)


def test_a_ring():
    config = replace(CONFIGS["window"], sliding_window=5)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    assert_as_exact(*models(config, "float32"), ids, [*range(3, 24, 3)], rolling=3)


@pytest.mark.parametrize("kind", ["gqa", "some windows", "window"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_masks_of_callers(kind, batch, rng):
    """Of any keys that there are, later ones of the same pass too, and of none."""
    rule = (rng.random((*batch, 24, 24)) < 0.4) & (rng.random((24, 1)) < 0.9)
    ids = rng.integers(0, 13, (2, 24))
    rolling = 4 if kind == "window" else None
    cuts = [*range(4, 24, 4)]
    assert_as_exact(*models(CONFIGS[kind], "float32"), ids, cuts, rule=rule, rolling=rolling)


def test_a_sequence_does_not_depend_on_its_batch_or_on_threads():
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 12))
    cuts = [5, 6, 7, 10]
    whole = decoded(model, ids, cuts, team=3)
    for row in range(3):
        assert_same_bits(whole[row : row + 1], decoded(model, ids[row : row + 1], cuts, team=1))


def test_scores_that_overflow_give_nan_and_what_padding_hides_gives_zeros():
    """As the definition does: a token of padding attends to nothing, and gets no NaN."""
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
    keep = np.ones((2, 12), bool)
    keep[1, :4] = False
    own, other = (run(model, ids, [5, 8], keep=keep) for run in (decoded, plain))
    np.testing.assert_array_equal(np.isfinite(own), np.isfinite(other))
    model.weights.layers[0].self_attn.qkv.fused[:] *= np.float32(1e25)
    own, other = (run(model, ids, [5, 8]) for run in (decoded, plain))
    assert not np.isfinite(own).all()
    np.testing.assert_array_equal(np.isnan(own), np.isnan(other))


def test_weights_changed_in_place_count_and_so_do_exchanged_layers():
    model, _ = models(CONFIGS["biases"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 12))
    before = decoded(model, ids, [6])
    model.weights.layers[0].input_layernorm[:] *= 2
    model.weights.layers[1].mlp.down_bias[:] += 1
    changed = decoded(model, ids, [6])
    assert abs(changed - before).max() > 1e-2
    np.testing.assert_allclose(changed, plain(model, ids, [6]), rtol=1e-4, atol=1e-4)
    model.weights.layers[0] = model.weights.layers[1]
    exchanged = decoded(model, ids, [6])
    assert abs(exchanged - changed).max() > 1e-2
    np.testing.assert_allclose(exchanged, plain(model, ids, [6]), rtol=1e-4, atol=1e-4)


def test_several_caches_take_turns():
    """Buffers are looked at anew where they are others than for the token before."""
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
    expected = [decoded(model, ids[i : i + 1], range(1, 12)) for i in range(2)]
    caches = [KVCache.create(model, 1, 12) for _ in range(2)]
    found = [[], []]
    with compiled_first(), mock.patch.object(fast_linear, "SMALL", 0):
        for token in range(12):
            for i in range(2):
                output = forward(model, ids[i : i + 1, token : token + 1], cache=caches[i])
                caches[i] = output.cache if token % 3 else output.cache.copy()
                found[i].append(output.logits)
    for parts, logits in zip(found, expected, strict=True):
        assert_same_bits(np.concatenate(parts, axis=1), logits)


def goes_another_way(model, ids, **options):
    with (
        mock.patch.object(decode, "_run", side_effect=AssertionError("by the kernel")),
        compiled_first(),
    ):
        return forward(model, ids, **options).logits


def test_what_the_kernel_of_layers_does_not_take():
    """Taps, whole prompts, float64 and weights of several dtypes go by the definition."""
    model, exact = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 12))
    expected = plain(model, ids, [])
    seen = []

    def tap(name, array):
        seen.append(name)
        return array

    cache = KVCache.create(model, 1, 12)
    np.testing.assert_allclose(goes_another_way(model, ids, cache=cache, tap=tap), expected, 1e-4)
    assert "model.layers.0.self_attn.q_proj" in seen
    np.testing.assert_allclose(goes_another_way(model, ids), expected, 1e-4)
    twice = np.tile(ids, (2, 1))
    cache = KVCache.create(model, 2, 12)
    np.testing.assert_allclose(goes_another_way(model, twice, cache=cache)[:1], expected, 1e-4)
    cache = KVCache.create(exact, 1, 12)
    np.testing.assert_allclose(goes_another_way(exact, ids, cache=cache), expected, 1e-3)
    weights = model.weights.layers[0]
    mixed = replace(weights, input_layernorm=weights.input_layernorm.astype(ml_dtypes.bfloat16))
    model.weights.layers[0] = mixed
    cache = KVCache.create(model, 1, 12)
    goes_another_way(model, ids, cache=cache)


def test_layers_of_other_sizes_than_the_first():
    """The kernel would read beyond them."""
    model, _ = models(CONFIGS["gqa"], "float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 12))
    mlp = model.weights.layers[1].mlp
    rows = len(mlp.gate_proj) - 4
    smaller = replace(
        mlp,
        gate_proj=mlp.gate_proj[:rows],
        up_proj=mlp.up_proj[:rows],
        down_proj=np.ascontiguousarray(mlp.down_proj[:, :rows]),
    )
    model.weights.layers[1] = replace(model.weights.layers[1], mlp=smaller)
    cache = KVCache.create(model, 1, 12)
    found = goes_another_way(model, ids, cache=cache)
    np.testing.assert_allclose(found, plain(model, ids, []), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [[6], [4, 5]])
def test_padding_with_nan_reaches_no_token(steps):
    """Before the first token of a sequence, in the kernel's cache."""
    weights = random_weights(CONFIGS["gqa"], 0, np.float32)
    weights["model.embed_tokens.weight"][0] = np.nan
    model = model_of(CONFIGS["gqa"], weights)
    ids = np.array([[0, 3, 5, 2, 7, 1], [4, 3, 5, 2, 7, 1]])
    keep = ids > 0
    logits = decoded(model, ids, [c for c in steps if c < 6], keep=keep)
    assert np.isfinite(logits[keep]).all()
