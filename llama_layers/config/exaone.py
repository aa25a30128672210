"""The names of modules in files of EXAONE 3, whose class in transformers is Llama's."""

from __future__ import annotations

EXAONE_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.layers.{}.input_layernorm": "transformer.h.{}.ln_1",
    "model.layers.{}.self_attn.q_proj": "transformer.h.{}.attn.attention.q_proj",
    "model.layers.{}.self_attn.k_proj": "transformer.h.{}.attn.attention.k_proj",
    "model.layers.{}.self_attn.v_proj": "transformer.h.{}.attn.attention.v_proj",
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.attention.out_proj",
    "model.layers.{}.post_attention_layernorm": "transformer.h.{}.ln_2",
    "model.layers.{}.mlp.gate_proj": "transformer.h.{}.mlp.c_fc_0",
    "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc_1",
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.c_proj",
    "model.norm": "transformer.ln_f",
}
