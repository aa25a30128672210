"""The presets of published sizes: numbers of parameters, and what published files say."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from llama_layers import LlamaConfig
from tests.support.published_configs import LLAMA

# Numbers of parameters, as published with the checkpoints.
PARAMETERS = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
    "smollm3_3b": 3_075_098_624,
    "phi4_14b": 14_659_507_200,
    "phi4_mini": 3_836_021_760,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset):
    c = getattr(LlamaConfig, preset)()
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    total = c.num_hidden_layers * layer + embeddings + c.hidden_size
    assert total == PARAMETERS[preset]


def test_presets_are_all_checked():
    names = {name for name in dir(LlamaConfig) if name.startswith(("llama", "smollm", "phi"))}
    presets = {name for name in names if callable(getattr(LlamaConfig, name))}
    assert presets == set(PARAMETERS)


def test_presets_agree_with_published_files():
    ours, published = LlamaConfig.llama3_1_8b(), LlamaConfig.from_json(LLAMA)
    assert replace(ours, dtype="bfloat16") == published
    small = LlamaConfig.llama3_2_1b()
    assert (small.head_dim, small.rope_scaling.factor) == (64, 32.0)
    assert LlamaConfig.llama3_2_3b().head_dim == 128
    assert LlamaConfig.llama3_8b().max_position_embeddings == 8192
    for preset, context, eps in (("llama_7b", 2048, 1e-6), ("llama2_7b", 4096, 1e-5)):
        config = getattr(LlamaConfig, preset)()
        assert (config.max_position_embeddings, config.rms_norm_eps) == (context, eps)
        assert (config.vocab_size, config.rope_theta) == (32000, 10000.0)


# As published with google/gemma-3-1b-it and ibm-granite/granite-3.3-8b-instruct, and inside
# google/gemma-3-12b-it.
GEMMA_3 = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window_pattern": 6,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
}
PUBLISHED = {
    "gemma3_1b": GEMMA_3
    | {
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "rope_scaling": None,
        "sliding_window": 512,
        "vocab_size": 262144,
    },
    "gemma3_12b": GEMMA_3
    | {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
    "granite3_3_8b": {
        "model_type": "granite",
        "attention_bias": False,
        "attention_multiplier": 0.0078125,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "logits_scaling": 16.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49159,
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_files(preset):
    assert getattr(LlamaConfig, preset)() == LlamaConfig.from_json(PUBLISHED[preset])


@pytest.mark.parametrize(
    ("preset", "millions"),
    # Table 1 of arXiv:2503.19786: parameters that are not of the embedding.
    [("gemma3_1b", 698), ("gemma3_4b", 3209), ("gemma3_12b", 10759), ("gemma3_27b", 25600)],
)
def test_gemma_3_has_the_published_number_of_parameters(preset, millions):
    c = getattr(LlamaConfig, preset)()
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size
    assert c.num_hidden_layers * layer / 1e6 == pytest.approx(millions, rel=1e-3)


def test_presets_can_be_pickled():
    preset = pickle.loads(pickle.dumps(LlamaConfig.llama2_7b))
    assert preset() == LlamaConfig.llama2_7b()
    assert preset.__name__ == "llama2_7b"
