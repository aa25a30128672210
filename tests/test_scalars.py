"""Multipliers, weights of norms plus 1, gelu and soft caps, in NumPy's narrow and wide formats."""

from __future__ import annotations

import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers import ConfigError, LlamaConfig, attention, forward, geglu, mlp, rms_norm
from llama_layers.layers.scaling import added, multiplied
from llama_layers.model.embedding import embedding_factor
from llama_layers.verify import geglu_bound
from tests.support import decoder_oracle, engines
from tests.support.random_models import CONFIGS, model_of, random_weights

BFLOAT16 = ml_dtypes.bfloat16
GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


def test_geglu(rng):
    gate, up = rng.standard_normal((2, 3, 50)) * 4
    expected = [decoder_oracle.gelu(g) * u for g, u in zip(gate.ravel(), up.ravel(), strict=True)]
    np.testing.assert_allclose(geglu(gate, up).ravel(), expected, rtol=1e-13, atol=1e-14)
    narrow = geglu(gate.astype(BFLOAT16), up.astype(BFLOAT16))
    assert narrow.dtype == BFLOAT16
    with pytest.raises(ValueError, match=r"^hidden_act: expected one of silu, gelu_py.*, got 'x'"):
        mlp(np.ones((1, 1, 10)), random_mlp(), hidden_act="x")


def random_mlp():
    config = CONFIGS["gqa"]
    return model_of(config, random_weights(config)).weights.layers[0].mlp


@pytest.mark.parametrize("form", ["tanh", "sigmoid", "factored"])
def test_every_form_of_gelu_is_within_its_bound(form):
    """Those of PyTorch, of kernels with exponentials, and of llama.cpp, in float32."""
    x = np.concatenate([np.linspace(-9, 9, 40001), np.geomspace(1e-30, 1e10, 999)])
    g = np.concatenate([x, -x]).astype(np.float32)
    y = dict(engines.gelu_forms(g))[form]
    bound = geglu_bound(g, np.ones_like(g))
    ratio = bound.ratio(y)
    assert ratio.max() <= 1
    assert np.isfinite(bound.limit).all()
    # A few units of the gate at most: the error function's gelu is found at once.
    assert (bound.limit <= 40 * 2.0**-24 * np.abs(g) + 1e-37).all()


def test_norm_weights_plus_one(rng):
    x, w = rng.standard_normal((3, 8)), rng.standard_normal(8)
    expected = rms_norm(x, 1 + w, eps=1e-5)
    np.testing.assert_array_equal(rms_norm(x, w, eps=1e-5, offset=1), expected)
    ones = rms_norm(x, None, eps=1e-5, offset=1)
    np.testing.assert_array_equal(ones, rms_norm(x, np.ones(8), eps=1e-5))
    # The sum is formed in float32, also for weights in bfloat16.
    tiny = np.full(8, 2.0**-12, BFLOAT16)
    x = x.astype(np.float32)
    wide = rms_norm(x, np.full(8, 1 + 2.0**-12, np.float32), eps=1e-5)
    np.testing.assert_array_equal(rms_norm(x, tiny, eps=1e-5, offset=1.0), wide)
    with pytest.raises(TypeError, match=r"^offset: "):
        rms_norm(x, tiny, eps=1e-5, offset="1")


@pytest.mark.parametrize("cap", [0.3, 2.0, 50.0])
def test_capped_scores(rng, cap):
    q, k, v = (rng.standard_normal((1, 5, heads, 4)) for heads in (4, 2, 2))
    expected = decoder_oracle.attention(q, k, v, scale=0.7, cap=cap)
    np.testing.assert_allclose(attention(q, k, v, scale=0.7, softcap=cap), expected, rtol=1e-12)
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=r"^softcap: expected"):
            attention(q, k, v, softcap=wrong)


def test_multipliers_round_once(rng):
    x, y = rng.standard_normal((2, 400)).astype(BFLOAT16)
    exact = [a.astype(np.float64) for a in (x, y)]
    np.testing.assert_array_equal(multiplied(y, 0.22), (exact[1] * 0.22).astype(BFLOAT16))
    expected = (exact[0] + exact[1] * 0.22).astype(BFLOAT16)
    found = added(x, y, 0.22)
    assert found.dtype == BFLOAT16
    assert np.mean(found == expected) > 0.99  # float32 in between may fall on a tie


def test_the_factor_of_gemma_has_the_dtype_of_the_table():
    config = LlamaConfig.from_json(GEMMA | {"hidden_size": 3072, "head_dim": 8})
    assert embedding_factor(config, np.ones((1, 1), BFLOAT16)) == 55.5
    assert embedding_factor(config, np.ones((1, 1), np.float32)) == np.float32(math.sqrt(3072))
    exact = replace(config, embedding_multiplier_rounded=False)
    assert embedding_factor(exact, np.ones((1, 1), BFLOAT16)) == math.sqrt(3072)


@pytest.mark.parametrize(("family", "times"), [("granite", 3.0), ("gemma", 1.0)])
def test_vectors_instead_of_ids(family, times, rng):
    config = replace(CONFIGS["gqa"], model_type=family, embedding_multiplier=3.0, hidden_act="silu")
    weights, x = random_weights(config), rng.standard_normal((1, 3, 10))
    seen = {}
    forward(model_of(config, weights), inputs_embeds=x, tap=lambda n, a: seen.setdefault(n, a))
    np.testing.assert_array_equal(seen["model.embed_tokens"], times * x)


def test_what_files_of_gemma_mean():
    config = LlamaConfig.from_json(GEMMA | {"sliding_window_pattern": 3, "hidden_act": "silu"})
    assert config.layer_types == (*["sliding_attention"] * 2, "full_attention") * 2
    assert config.layer_rope_theta == (1e4, 1e4, 1e6) * 2
    assert config.attention_scale == 1 / 16
    assert config.hidden_act == "gelu_pytorch_tanh"  # hidden_activation is the key
    assert config.embedding_multiplier == math.sqrt(32)
    assert (config.head_dim, config.num_key_value_heads) == (256, 4)
    assert config.tie_word_embeddings
    second = LlamaConfig.from_json(GEMMA | {"model_type": "gemma2", "query_pre_attn_scalar": 144})
    assert second.attention_scale == 1 / 12
    assert second.to_json()["query_pre_attn_scalar"] == 144
    assert (second.attn_logit_softcapping, second.final_logit_softcapping) == (50, 30)
    assert second.layer_types == ("sliding_attention", "full_attention") * 3
    first = LlamaConfig.from_json(
        GEMMA | {"model_type": "gemma", "hidden_act": "gelu", "num_key_value_heads": 1}
    )
    assert first.hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False or"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a positive"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping: expected a positive"),
        ({"hidden_activation": "relu"}, "hidden_act: expected one of silu, gelu_pytorch_tanh"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern: expected a positive integer"),
        ({"model_type": "hyperclovax", "use_post_norm": 1}, "use_post_norm: expected true or"),
        ({"model_type": "granite", "logits_scaling": -1}, "logits_scaling: expected a positive"),
        ({"model_type": "llama", "residual_multiplier": 2}, "residual_multiplier = 2 changes the"),
        ({"llama_layers": {"norm_weight_offset": 2}}, "norm_weight_offset: expected 0 or 1, got 2"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_json(GEMMA | change)
