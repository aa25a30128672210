"""GGUF files of Granite and of Gemma: their numbers, and norms with 1 in the weights."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llama_layers import ConfigError, forward, load
from llama_layers.checkpoint.gguf.config import read_config
from tests.support import decoder_oracle
from tests.support.gguf_files import MODEL, encode, llama

IDS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def written(tmp_path, architecture, tensors, **keys):
    """A file of another architecture."""
    metadata = {}
    for key, value in MODEL.items():
        metadata[key.replace("llama.", f"{architecture}.")] = value
    metadata["general.architecture"] = ("str", architecture)
    for key, value in keys.items():
        kind = "u32" if isinstance(value, int) else "f32"
        metadata[f"{architecture}.{key.replace('__', '.')}"] = (kind, value)
    file = tmp_path / "m.gguf"
    file.write_bytes(encode(metadata, tensors).content)
    return file


def tensors(*names, layers=2, head=True):
    """Random tensors, with norms of these names besides Llama's."""
    rng = np.random.default_rng(0)
    found = llama(layers=layers, qk_norm="attn_q_norm" in names)
    for layer in range(layers):
        found |= {f"blk.{layer}.{n}.weight": np.zeros(32) for n in names if n.startswith("post")}
    if not head:
        del found["output.weight"]
    return {
        name: np.float32(
            rng.standard_normal(array.shape) / (math.sqrt(32) if array.ndim == 2 else 4)
            + (array.ndim == 1)
        )
        for name, array in found.items()
    }


def test_granite(tmp_path):
    weights = tensors()
    numbers = {
        "embedding_scale": 12.0,
        "attention__scale": 0.1,
        "residual_scale": 0.22,
        "logit_scale": 6.0,
    }
    path = written(tmp_path, "granite", weights, **numbers)
    config = load(path).config
    assert config.model_type == "granite"
    assert config.embedding_multiplier == 12
    assert config.attention_multiplier == 0.1
    assert config.residual_multiplier == 0.22
    assert config.logits_scaling == 6
    # The rows of a pair are next to each other, as in files of llama.
    stored = load(path).weights.layers[0].self_attn.qkv.fused[:8]
    expected = weights["blk.0.attn_q.weight"][:8].reshape(4, 2, 32).swapaxes(0, 1).reshape(8, 32)
    np.testing.assert_array_equal(stored, expected)


def test_granite_without_numbers(tmp_path):
    config = load(written(tmp_path, "granite", tensors())).config
    assert config.attention_multiplier is None
    assert config.embedding_multiplier == config.logits_scaling == 1


GEMMAS = {
    "gemma": ((), {}),
    "gemma2": (
        ("post_attention_norm", "post_ffw_norm"),
        {"attention__sliding_window": 3, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        ("post_attention_norm", "post_ffw_norm", "attn_q_norm"),
        {
            "attention__sliding_window": 3,
            "rope__freq_base": 500.0,
            "rope__freq_base_swa": 30.0,
            "final_logit_softcapping": 1.5,
        },
    ),
}


@pytest.mark.parametrize("architecture", GEMMAS)
def test_gemma(tmp_path, architecture):
    """The numbers of the file, and what the naive oracle computes with them."""
    names, keys = GEMMAS[architecture]
    layers = 6 if architecture == "gemma3" else 2
    weights = tensors(*names, layers=layers, head=False)
    keys = keys | {"block_count": layers}
    model = load(written(tmp_path, architecture, weights, **keys))
    config = model.config
    assert config.norm_weight_offset == 0
    assert config.embedding_multiplier == pytest.approx(math.sqrt(32))
    assert config.tie_word_embeddings
    assert config.hidden_act == "gelu_pytorch_tanh"
    types = {
        "gemma": None,
        "gemma2": ("sliding_attention", "full_attention"),
        "gemma3": (*["sliding_attention"] * 5, "full_attention"),
    }
    assert config.layer_types == types[architecture]
    if architecture == "gemma2":
        assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (2.0, 30.0)
    if architecture == "gemma3":
        assert config.attn_logit_softcapping is None
        assert config.final_logit_softcapping == 1.5
        assert config.layer_rope_theta == (*[30.0] * 5, 500.0)
    named = model.weights.named(config.model_type).items()
    exact = {name: np.asarray(array, np.float64) for name, array in named}
    expected = decoder_oracle.logits(exact, config, IDS[0])
    np.testing.assert_allclose(forward(model, IDS).logits, expected[None], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_27b_scales_by_another_width(tmp_path, architecture, layers):
    """llama.cpp knows it by its number of layers."""
    numbers = {key.replace("llama", architecture): value for key, (_, value) in MODEL.items()}
    numbers |= {
        "general.architecture": architecture,
        f"{architecture}.block_count": layers,
        f"{architecture}.attention.key_length": 4,
    }
    config = read_config(numbers, {"token_embd.weight": (40, 32)}, {}).config
    assert config.attention_scale == (32 // 4) ** -0.5


def test_a_window_of_the_first_gemma_is_refused(tmp_path):
    path = written(tmp_path, "gemma", tensors(head=False), attention__sliding_window=3)
    with pytest.raises(ConfigError, match="sliding_window"):
        load(path)
