"""Mistakes in ports of Gemma that other mistakes look like in few bits."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from llama_layers import forward
from llama_layers.verify import Trace, check
from tests.support.ported import CONFIGS, LAYER, WEIGHTS
from tests.support.random_models import model_of

CONFIG = CONFIGS["gemma"]
IDS = np.random.default_rng(6).integers(0, CONFIG.vocab_size, (2, 12))
SITE = f"model.layers.{LAYER}.self_attn.q_norm"


def causes(site, wrong, weights=WEIGHTS["gemma"], dtype=np.float32):
    """What is told of a port that has something else at a site."""
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    model, arrays = model_of(CONFIG, weights), {}

    def tap(name, array):
        if name == site:
            array = wrong(arrays).astype(array.dtype).reshape(array.shape)
        arrays[name] = array
        return array

    forward(model, IDS, tap=tap)
    first = check(Trace(arrays, IDS), model).first
    assert first.site.name == site
    return first.explanations


def test_a_norm_without_its_weight_is_not_one_of_misread_bits():
    """Bits of small numbers in float16 are almost nothing in bfloat16, beside Gemma's 1."""

    def skipped(arrays):
        x = arrays[SITE.replace("norm", "proj")].astype(np.float64)
        x = x.reshape(*x.shape[:2], -1, CONFIG.head_dim)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + CONFIG.rms_norm_eps)

    small = np.random.default_rng(7).normal(0.0, 0.2, CONFIG.head_dim)
    weights = WEIGHTS["gemma"] | {f"{SITE}.weight": small}
    found = causes(SITE, skipped, weights, ml_dtypes.bfloat16)
    assert [cause.name for cause in found] == ["norm weight skipped"]


def test_an_embedding_scaled_by_all_of_hidden_size():
    rows = WEIGHTS["gemma"]["model.embed_tokens.weight"][IDS]
    (cause,) = causes("model.embed_tokens", lambda _: rows * np.float32(CONFIG.hidden_size))
    assert cause.name == "another embedding multiplier"
    assert "by hidden_size, not its root" in cause.detail
