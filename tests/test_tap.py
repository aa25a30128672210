"""The taps of a forward pass: where, in which order, with what, and that patches take effect."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers import KVCache, decoder_layer, forward, mlp, rope_table
from llama_layers.testing import assert_same_bits
from tests.support import decoder_oracle
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights, run_in_chunks
from tests.test_forward import assert_close

IDS = np.array([[3, 1, 4, 1, 5]])

IN_LAYER = """
    input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.q_rope
    self_attn.k_rope self_attn.attention self_attn.o_proj attention_residual
    post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.act mlp.down_proj
""".split()


def in_layer(config):
    names = [*IN_LAYER]
    if config.qk_norm != "none":
        place = names.index(f"self_attn.{'attention' if config.qk_norm_after_rope else 'q_rope'}")
        names[place:place] = ["self_attn.q_norm", "self_attn.k_norm"]
    if config.norm_placement == "after":
        names = [name for name in names if "layernorm" not in name]
    if config.norm_placement != "before":
        names.insert(names.index("attention_residual"), "post_self_attn_layernorm")
        names.append("post_mlp_layernorm")
    return [decoder_oracle.called(config, name) for name in names]


def sites_of(config):
    layers = range(config.num_hidden_layers)
    inside = [
        name
        for layer in layers
        for name in [
            *(f"model.layers.{layer}.{site}" for site in in_layer(config)),
            f"model.layers.{layer}",
        ]
    ]
    last = ["lm_head", "logits"] if config.changes_logits else ["lm_head"]
    return ["model.embed_tokens", *inside, "model.norm", *last]


def recorded(model, ids, **options):
    seen = []

    def tap(name, array):
        seen.append((name, array))
        return array

    return seen, forward(model, ids, tap=tap, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_in_order_with_its_numbers(name):
    config = CONFIGS[name]
    weights = random_weights(config)
    seen, output = recorded(model_of(config, weights), IDS)
    assert [site for site, _ in seen] == sites_of(config)
    expected = decoder_oracle.forward(weights, config, IDS[0], lengths=[5] * 5)
    for site, array in seen:
        assert_close(array[0], expected[site])
    assert seen[-1][1] is output.logits


def test_shapes():
    seen, _ = recorded(model_of(GQA, random_weights(GQA)), IDS)
    shapes = {site.removeprefix("model.layers.0."): array.shape for site, array in seen}
    assert {site: shapes[site] for site in ["model.embed_tokens", *IN_LAYER, "lm_head"]} == {
        "model.embed_tokens": (1, 5, 10),
        "input_layernorm": (1, 5, 10),
        "self_attn.q_proj": (1, 5, 16),
        "self_attn.k_proj": (1, 5, 8),
        "self_attn.v_proj": (1, 5, 8),
        "self_attn.q_rope": (1, 5, 4, 4),
        "self_attn.k_rope": (1, 5, 2, 4),
        "self_attn.attention": (1, 5, 4, 4),
        "self_attn.o_proj": (1, 5, 10),
        "attention_residual": (1, 5, 10),
        "post_attention_layernorm": (1, 5, 10),
        "mlp.gate_proj": (1, 5, 14),
        "mlp.up_proj": (1, 5, 14),
        "mlp.act": (1, 5, 14),
        "mlp.down_proj": (1, 5, 10),
        "lm_head": (1, 5, 13),
    }


def test_recording_changes_no_bit():
    model = model_of(GQA, random_weights(GQA, dtype=np.float32))
    _, tapped = recorded(model, IDS)
    assert_same_bits(tapped.logits, forward(model, IDS).logits)


@pytest.mark.parametrize("site", sites_of(GQA))
def test_patch_takes_the_place_of_the_array(site, rng):
    """Patching in what another text gave at all sites of a moment gives that text's logits."""
    model = model_of(GQA, random_weights(GQA))
    other = (IDS + 1 + np.arange(5)) % GQA.vocab_size
    theirs, _ = recorded(model, other)
    theirs = dict(theirs)
    noise = rng.standard_normal(theirs[site].shape)

    def recorded_with(patch):
        seen = {}

        def tap(name, array):
            seen[name] = patch if name == site else array
            return seen[name]

        return seen, forward(model, IDS, tap=tap).logits

    seen, logits = recorded_with(noise)
    plain = dict(recorded(model, IDS)[0])
    after = sites_of(GQA).index(site)
    for name in sites_of(GQA)[:after]:
        assert_same_bits(seen[name], plain[name])
    if site == "lm_head":
        assert logits is noise
    else:
        assert np.abs(logits - plain["lm_head"]).max() > 1e-3
    # The residual stream is all that later layers see.
    if site in ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"):
        _, logits = recorded_with(theirs[site])
        assert_same_bits(logits, theirs["lm_head"])


@pytest.mark.parametrize(
    "site",
    [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.post_attention_layernorm",
    ],
)
def test_zeroing_a_site_is_zeroing_its_weight(site):
    weights = random_weights(GQA)
    weight = f"{site}.weight"
    model = model_of(GQA, weights)
    patched = forward(model, IDS, tap=lambda name, a: 0 * a if name == site else a).logits
    zeroed = decoder_oracle.logits(weights | {weight: 0 * weights[weight]}, GQA, IDS[0])
    assert_close(patched[0], zeroed)


def test_patched_keys_reach_the_cache():
    model = model_of(GQA, random_weights(GQA))
    site = "model.layers.1.self_attn.k_rope"
    cache = KVCache.create(model, 1, 5)
    output = forward(model, IDS, cache=cache, tap=lambda n, a: a + 1 if n == site else a)
    plain = forward(model, IDS, cache=KVCache.create(model, 1, 5))
    assert_same_bits(output.cache.keys[0], plain.cache.keys[0])
    assert_close(output.cache.keys[1], plain.cache.keys[1] + 1)


def test_last_only_reaches_the_last_sites_only():
    seen, _ = recorded(model_of(GQA, random_weights(GQA)), IDS, last_only=True)
    seen = dict(seen)
    assert seen["model.layers.1"].shape == (1, 5, 10)
    assert seen["model.norm"].shape == (1, 1, 10)
    assert seen["lm_head"].shape == (1, 1, 13)


def test_layer_and_mlp_use_names_inside_themselves(rng):
    model = model_of(GQA, random_weights(GQA))
    names = []

    def tap(name, array):
        names.append(name)
        return array

    x = rng.standard_normal((1, 2, 10))
    layer = model.weights.layers[0]
    rope = rope_table(np.arange(2), GQA, like=x)
    decoder_layer(x, layer, config=GQA, rope=rope, mask=None, tap=tap)
    assert names == IN_LAYER
    names.clear()
    mlp(x, layer.mlp, tap=tap)
    assert names == ["gate_proj", "up_proj", "act", "down_proj"]


def test_cached_pass_taps_the_new_tokens():
    weights = random_weights(GQA)
    model = model_of(GQA, weights)
    cache = forward(model, IDS[:, :3], cache=KVCache.create(model, 1, 5)).cache
    seen, _ = recorded(model, IDS[:, 3:], cache=cache)
    expected = decoder_oracle.forward(weights, GQA, IDS[0])
    for site, array in seen:
        assert_close(array[0], expected[site][3:])
    assert run_in_chunks(model, IDS, [3]).shape == (1, 5, 13)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda array: None, "NoneType"),
        (lambda array: array[..., :1], r"\[1, 3, 1\], float32"),
        (lambda array: array.astype(np.float64), r"\[1, 3, \d+\], float64"),
    ],
)
@pytest.mark.parametrize("site", ["model.layers.0.self_attn.o_proj", "model.norm"])
def test_what_a_tap_must_give(site, wrong, got):
    def tap(name, array):
        return wrong(array) if name == site else array

    expected = rf"tap at {site}: expected an array of shape and dtype \[1, 3, \d+\], float32, got "
    with pytest.raises(ValueError, match=expected + got):
        forward(
            model_of(GQA, random_weights(GQA, dtype=np.float32)),
            np.array([[1, 2, 3]]),
            tap=tap,
        )
