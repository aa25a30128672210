"""The presets of published sizes: numbers of parameters, and what published files say."""

from __future__ import annotations

import pickle
from dataclasses import replace
from math import prod

import pytest

from llama_layers import LlamaConfig
from llama_layers.checkpoint import expected_tensors
from llama_layers.config.presets import Preset, PublishedSizes
from tests.support.published_configs import LLAMA

# Numbers of parameters, as published with the checkpoints, less copies of a tied head.
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
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma3_1b": 999_885_952,
    "gemma3_12b": 11_766_034_176,
    "granite3_3_2b": 2_533_539_840,
    "granite3_3_8b": 8_170_864_640,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
}
# Table 1 of arXiv:2503.19786: millions that are not of the embedding.
GEMMA_3_MILLIONS = {"gemma3_1b": 698, "gemma3_4b": 3209, "gemma3_12b": 10759, "gemma3_27b": 25600}


def parameters(config):
    return sum(prod(shape) for shape in expected_tensors(config).values())


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset):
    assert parameters(getattr(LlamaConfig, preset)()) == PARAMETERS[preset]


@pytest.mark.parametrize("preset", GEMMA_3_MILLIONS)
def test_gemma_3_has_the_published_number_of_parameters(preset):
    config = getattr(LlamaConfig, preset)()
    millions = (parameters(config) - config.vocab_size * config.hidden_size) / 1e6
    assert millions == pytest.approx(GEMMA_3_MILLIONS[preset], rel=1e-3)


def test_presets_are_all_checked():
    presets = {name for name, value in vars(PublishedSizes).items() if isinstance(value, Preset)}
    assert presets == PARAMETERS.keys() | GEMMA_3_MILLIONS.keys()


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


# As published with google/gemma-3-1b-it, inside google/gemma-3-12b-it and google/gemma-3-27b-it,
# with ibm-granite/granite-3.3-*-instruct, HuggingFaceTB/SmolLM3-3B, microsoft/phi-4,
# microsoft/Phi-4-mini-instruct and allenai/OLMo-2-0425-1B; 32B as OLMo-core's olmo2_32B has it.
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
GRANITE_3 = {
    "model_type": "granite",
    "attention_bias": False,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "hidden_act": "silu",
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
}
OLMO_2 = {
    "model_type": "olmo2",
    "attention_bias": False,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
LONG_FACTOR = [
    float(each)
    for each in """
        1 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649
        2.446418898 2.735880826 3.059592084 3.421605075 3.826451687 4.279200023 4.785517845
        5.351743533 5.984965424 6.693110555 7.485043894 8.370679318 9.36110372 10.4687158
        11.70738129 13.09260651 14.64173252 16.37415215 18.31155283 20.47818807 22.90118105
        25.61086418 28.64115884 32.03 32.1 32.13 32.23 32.6 32.61 32.64 32.66 32.7 32.71 32.93
        32.97 33.28 33.49 33.5 44.16 47.77
    """.split()
]
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
    "gemma3_27b": GEMMA_3
    | {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
    "granite3_3_2b": GRANITE_3
    | {
        "attention_multiplier": 0.015625,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
    },
    "granite3_3_8b": GRANITE_3
    | {
        "attention_multiplier": 0.0078125,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "logits_scaling": 16.0,
    },
    "smollm3_3b": {
        "model_type": "smollm3",
        "bos_token_id": 128000,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    # Its first files had 100257 for all three tokens; a later one has corrected two of them.
    "phi4_14b": {
        "model_type": "phi3",
        "attention_bias": False,
        "bos_token_id": 100257,
        "eos_token_id": 100265,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "pad_token_id": 100349,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "phi4_mini": {
        "model_type": "phi3",
        "attention_bias": False,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": LONG_FACTOR,
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "olmo2_1b": OLMO_2
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
    },
    "olmo2_32b": OLMO_2
    | {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_files(preset):
    assert getattr(LlamaConfig, preset)() == LlamaConfig.from_json(PUBLISHED[preset])


def test_presets_can_be_pickled():
    preset = pickle.loads(pickle.dumps(LlamaConfig.llama2_7b))
    assert preset() == LlamaConfig.llama2_7b()
    assert preset.__name__ == "llama2_7b"
