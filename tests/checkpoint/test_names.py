"""Names of three conventions."""

from __future__ import annotations

import gguf
import pytest

from llama_layers.checkpoint import expected_tensors
from llama_layers.checkpoint.names import from_gguf, from_meta
from tests.support import tiny


def test_expected_tensors_of_a_layer_in_the_order_of_files():
    shapes = expected_tensors(tiny.QWEN2)
    assert list(shapes.items())[:14] == [
        ("model.embed_tokens.weight", (40, 32)),
        ("model.layers.0.input_layernorm.weight", (32,)),
        ("model.layers.0.self_attn.q_proj.weight", (32, 32)),
        ("model.layers.0.self_attn.k_proj.weight", (16, 32)),
        ("model.layers.0.self_attn.v_proj.weight", (16, 32)),
        ("model.layers.0.self_attn.q_proj.bias", (32,)),
        ("model.layers.0.self_attn.k_proj.bias", (16,)),
        ("model.layers.0.self_attn.v_proj.bias", (16,)),
        ("model.layers.0.self_attn.o_proj.weight", (32, 32)),
        ("model.layers.0.post_attention_layernorm.weight", (32,)),
        ("model.layers.0.mlp.gate_proj.weight", (48, 32)),
        ("model.layers.0.mlp.up_proj.weight", (48, 32)),
        ("model.layers.0.mlp.down_proj.weight", (32, 48)),
        ("model.layers.1.input_layernorm.weight", (32,)),
    ]
    assert list(shapes)[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert "lm_head.weight" not in expected_tensors(tiny.TIED)


def test_the_gguf_package_has_the_same_names():
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    for name in expected_tensors(tiny.BIASED):
        name = name.replace("layers.1.", "layers.11.")
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert from_gguf(theirs, "llama") == name


def test_the_gguf_package_takes_meta_names_for_the_same():
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name in tiny.meta(tiny.arrays()):
        theirs = table.get_name(name, try_suffixes=(".weight",))
        assert from_meta(name) == from_gguf(theirs, "llama")


@pytest.mark.parametrize(
    "name", ["layers.00.attention.wq.weight", "layers.{}.attention.wq.weight", "wq", "x.weight"]
)
def test_other_names_stay(name):
    assert from_meta(name) == name
