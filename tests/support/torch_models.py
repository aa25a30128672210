"""Small random models of transformers, and their weights compared with ours."""

from __future__ import annotations

import pytest

from llama_layers.arrays.transfer import to_numpy
from tests.support import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FAMILY = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def random_model(family="llama", **options):
    """A model of transformers, in which biases are not zeros and norms not ones."""
    torch.manual_seed(0)
    config = getattr(transformers, FAMILY[family] + "Config")(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )
    model = getattr(transformers, FAMILY[family] + "ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def assert_same_weights(model, reference):
    """Every weight equals transformers' own, bit for bit."""
    expected = {name: to_numpy(tensor) for name, tensor in reference.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    for name, array in tiny.all_arrays(model).items():
        assert to_numpy(array).dtype == expected[name].dtype, name
        assert to_numpy(array).tobytes() == expected.pop(name).tobytes(), name
    assert not expected
