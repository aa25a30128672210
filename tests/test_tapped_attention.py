"""Taps of scores and probabilities, and taps by the names of sites."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llama_layers import KVCache, decoder_layer, forward, mlp, rope_table
from llama_layers.arrays.transfer import to_numpy
from llama_layers.testing import assert_same_bits
from llama_layers.verify import record
from tests.support import decoder_oracle
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights
from tests.test_forward import FLOAT32, assert_close

IDS = np.array([[3, 1, 4, 1, 5, 9]])
LAYER = "model.layers.1.self_attn"


def unchanged(name, array):
    return array


def kept(model, *keys, array=np.asarray, ids=IDS, **options):
    """The arrays of the sites that keys name, and the output."""
    seen = {}

    def keep(name, array):
        assert name not in seen
        seen[name] = to_numpy(array)
        return array

    return seen, forward(model, array(ids), tap=dict.fromkeys(keys, keep), **options)


def naive_scores(sites, config, layer):
    """Scaled products [heads, S, T] of the oracle's queries and keys."""
    q, k = (sites[f"model.layers.{layer}.self_attn.{name}_rope"] for name in "qk")
    group = config.num_attention_heads // config.num_key_value_heads
    scores = np.zeros((config.num_attention_heads, len(q), len(k)))
    for h, s, t in np.ndindex(*scores.shape):
        scores[h, s, t] = sum(map(float, q[s, h] * k[t, h // group])) / math.sqrt(config.head_dim)
    return scores


def naive_probabilities(scores, window=None):
    p = np.zeros(scores.shape)
    for h, s in np.ndindex(*scores.shape[:2]):
        seen = [t for t in range(s + 1) if window is None or s - t < window]
        p[h, s, seen] = decoder_oracle.softmax(scores[h, s, seen].tolist())
    return p


@pytest.mark.parametrize("kind", ["gqa", "mqa", "window", "some windows"])
def test_like_naive_loops(backend, kind):
    config = CONFIGS[kind]
    weights = random_weights(config, dtype=np.float32)
    model = model_of(config, weights, backend.array)
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    expected = decoder_oracle.forward(wide, config, IDS[0])
    seen, output = kept(model, "scores", "probabilities", array=backend.array)
    assert len(seen) == 2 * config.num_hidden_layers
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        scores = naive_scores(expected, config, layer)
        assert_close(seen[f"{name}.scores"][0], scores, FLOAT32)
        p = naive_probabilities(scores, config.window_of(layer))
        assert_close(seen[f"{name}.probabilities"][0], p, FLOAT32)
        hidden = seen[f"{name}.probabilities"][0][p == 0]
        assert (hidden == 0).all()
    assert backend.holds(output.logits)
    assert_close(output.logits[0, ...], expected["lm_head"], FLOAT32)


def test_of_a_padded_batch_and_of_a_cache(rng):
    model = model_of(GQA, random_weights(GQA))
    ids = rng.integers(13, size=(2, 6))
    keep = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    seen, _ = kept(model, "probabilities", ids=ids, attention_mask=keep)
    alone, _ = kept(model, "probabilities", ids=ids[1:, 2:])
    cache = forward(
        model, ids[:, :4], cache=KVCache.create(model, 2, 9), attention_mask=keep[:, :4]
    ).cache
    later, _ = kept(model, "probabilities", ids=ids[:, 4:], cache=cache)
    for name, p in seen.items():
        assert p.shape == (2, 4, 6, 6)
        assert (p[1, :, 2:, :2] == 0).all()
        assert_close(p[1:, :, 2:, 2:], alone[name])
        assert later[name].shape == (2, 4, 2, 6)
        assert_close(later[name], p[:, :, 4:])


@pytest.mark.parametrize("key", ["scores", "probabilities"])
def test_an_identity_changes_only_roundings(key):
    for kind in ("gqa", "some windows"):
        model = model_of(CONFIGS[kind], random_weights(CONFIGS[kind]))
        assert_close(forward(model, IDS, tap={key: unchanged}).logits, forward(model, IDS).logits)


def test_a_head_switched_off_is_its_columns_of_the_projection_at_zero(backend):
    weights = random_weights(GQA, dtype=np.float32)
    model = model_of(GQA, weights, backend.array)
    heads = backend.array(np.array([1, 1, 0, 1], np.float32).reshape(4, 1, 1))
    off = forward(
        model, backend.array(IDS), tap={f"{LAYER}.probabilities": lambda name, p: p * heads}
    ).logits
    zeroed = {name: array.astype(np.float64) for name, array in weights.items()}
    zeroed[f"{LAYER}.o_proj.weight"][:, 8:12] = 0
    assert_close(off[0, ...], decoder_oracle.logits(zeroed, GQA, IDS[0]), FLOAT32)


def test_an_edge_knocked_out_is_recomputed_without_it():
    """At a score of minus infinity the other keys share its weight, at a probability of 0 not."""
    weights = random_weights(GQA)
    model = model_of(GQA, weights)

    def hide(name, scores):
        scores = scores.copy()
        scores[:, 1, 4, 2] = -math.inf
        return scores

    def drop(name, p):
        p = p.copy()
        p[:, 1, 4, 2] = 0
        return p

    dropped = forward(model, IDS, tap={f"{LAYER}.probabilities": drop}).logits[0]
    change = {1: lambda h, s, t, p: 0.0 if (h, s, t) == (1, 4, 2) else p}
    expected = decoder_oracle.forward(weights, GQA, IDS[0], changes=change)["lm_head"]
    assert_close(dropped, expected)

    hidden = forward(model, IDS, tap={f"{LAYER}.scores": hide}).logits[0]
    scores = naive_scores(decoder_oracle.forward(weights, GQA, IDS[0]), GQA, 1)
    scores[1, 4, 2] = -math.inf
    p = naive_probabilities(scores)
    change = {1: lambda h, s, t, _: p[h, s, t]}
    expected = decoder_oracle.forward(weights, GQA, IDS[0], changes=change)["lm_head"]
    assert_close(hidden, expected)
    assert np.abs(hidden - dropped).max() > 1e-3


def test_a_pattern_patched_in_from_another_text():
    weights = random_weights(GQA)
    model = model_of(GQA, weights)
    other = (IDS + 2) % 13
    theirs = naive_probabilities(
        naive_scores(decoder_oracle.forward(weights, GQA, other[0]), GQA, 0)
    )
    name = "model.layers.0.self_attn.probabilities"
    patched = forward(model, IDS, tap={name: lambda name, p: theirs[None]}).logits[0]
    change = {0: lambda h, s, t, _: theirs[h, s, t]}
    assert_close(patched, decoder_oracle.forward(weights, GQA, IDS[0], changes=change)["lm_head"])


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_nothing_in_nothing_out(shape):
    model = model_of(GQA, random_weights(GQA))
    seen, output = kept(model, "scores", "probabilities", ids=np.zeros(shape, int))
    assert output.logits.shape == (*shape, 13)
    assert all(array.shape == (shape[0], 4, shape[1], shape[1]) for array in seen.values())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_they_have_the_dtype_of_sums(dtype):
    seen, _ = kept(model_of(GQA, random_weights(GQA, dtype=dtype)), "scores", "probabilities")
    assert {array.dtype for array in seen.values()} == {np.dtype(dtype)}


def test_a_callable_is_not_called_for_them():
    names = []
    model = model_of(GQA, random_weights(GQA))
    forward(model, IDS, tap=lambda name, array: names.append(name) or array)
    assert not any(name.endswith(("scores", "probabilities")) for name in names)


NAMED = {
    "lm_head": ["lm_head"],
    "model.layers.1": ["model.layers.1"],
    "layer": ["model.layers.0", "model.layers.1"],
    "*.0.mlp.*": [f"model.layers.0.mlp.{n}" for n in ("gate_proj", "up_proj", "act", "down_proj")],
    "self_attn.scores": [f"model.layers.{n}.self_attn.scores" for n in (0, 1)],
    "q_rope": [f"model.layers.{n}.self_attn.q_rope" for n in (0, 1)],
    "*_tokens": ["model.embed_tokens"],
}


@pytest.mark.parametrize("key", NAMED)
def test_keys_are_names_as_of_record(key):
    model = model_of(GQA, random_weights(GQA))
    seen, _ = kept(model, key)
    assert list(seen) == NAMED[key]
    assert list(record(model, IDS, sites=[key]).arrays) == NAMED[key]


def test_every_site_can_be_named():
    model = model_of(GQA, random_weights(GQA))
    seen, _ = kept(model, "*")
    trace = record(model, IDS, sites=["*"])
    assert list(seen) == list(trace.arrays)
    for name, array in trace.arrays.items():
        assert_same_bits(array, seen[name])


def test_functions_of_a_site_are_called_one_after_the_other():
    model = model_of(GQA, random_weights(GQA))
    tap = {
        "o_proj": lambda name, array: array + 1,
        f"{LAYER}.*": lambda name, array: array * (2 if name.endswith("o_proj") else 1),
        f"{LAYER}.o_proj": lambda name, array: array - 3,
    }

    def all_at_once(name, array):
        if not name.endswith("o_proj"):
            return array
        return (array + 1) * 2 - 3 if name.startswith(LAYER) else array + 1

    logits = forward(model, IDS, tap=tap).logits
    assert_close(logits, forward(model, IDS, tap=all_at_once).logits)


def test_an_empty_mapping_is_no_tap():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    assert_same_bits(forward(model, IDS, tap={}).logits, forward(model, IDS).logits)


def test_a_layer_and_an_mlp_take_names_inside_themselves(rng):
    model = model_of(GQA, random_weights(GQA))
    x = rng.standard_normal((1, 3, 10))
    layer, names = model.weights.layers[0], []

    def note(name, array):
        names.append(name)
        return array

    rope = rope_table(np.arange(3), GQA, like=x)
    options = {"config": GQA, "rope": rope, "mask": np.tri(3, dtype=bool)}
    keys = ["probabilities", "self_attn.q_*", "mlp.act"]
    decoder_layer(x, layer, **options, tap=dict.fromkeys(keys, note))
    inside = ["self_attn.q_proj", "self_attn.q_rope", "self_attn.probabilities", "mlp.act"]
    assert names == inside
    names.clear()
    mlp(x, layer.mlp, tap={"*_proj": note})
    assert names == ["gate_proj", "up_proj", "down_proj"]
    for call in (
        lambda: decoder_layer(x, layer, **options, tap={"layer": note}),
        lambda: decoder_layer(x, layer, **options, tap={"model.layers.0.mlp.act": note}),
        lambda: mlp(x, layer.mlp, tap={"mlp.act": note}),
    ):
        with pytest.raises(ValueError, match="tap: expected names of sites, got "):
            call()


@pytest.mark.parametrize(
    ("tap", "error", "message"),
    [
        ({"q_rop": unchanged}, ValueError, r"'q_rop', which names none \(is it 'q_rope'\?\)"),
        ({"model.layers.2": unchanged}, ValueError, "tap: .* 'model.layers.2', which names none"),
        ({3: unchanged}, TypeError, "tap: expected names of sites, got int"),
        ({"scores": 3}, TypeError, "tap: expected a callable for 'scores', got int"),
        (["scores"], TypeError, "tap: expected a callable, a mapping of .*, or None, got list"),
        (
            {"probabilities": lambda name, p: p[:, :1]},
            ValueError,
            r"tap at model.layers.0.self_attn.probabilities: .* \[1, 4, 6, 6\], .* got \[1, 1, 6",
        ),
        (
            {f"{LAYER}.scores": lambda name, p: None},
            ValueError,
            f"tap at {LAYER}.scores: expected an array .*, got NoneType",
        ),
    ],
)
def test_refuses(tap, error, message):
    with pytest.raises(error, match=message):
        forward(model_of(GQA, random_weights(GQA)), IDS, tap=tap)


def test_names_are_refused_before_anything_is_computed():
    model = model_of(GQA, random_weights(GQA))
    tap = {"lm_head": pytest.fail, "nothing": pytest.fail}
    with pytest.raises(ValueError, match="'nothing', which names none"):
        forward(model, IDS, tap=tap)
