"""Mistakes made in a transformers model: found at the right first site, and named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from llama_layers import load
from llama_layers.verify import check
from llama_layers.verify.recorders import record_transformers

pytestmark = pytest.mark.peer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}


def attention_of(model: Any, layer: int = 1) -> Any:
    return model.model.layers[layer].self_attn


def rows_moved(rows: Any, heads: int) -> Any:
    """Rows of a projection as GGUF files have them."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def interleaved(model, patch):
    def rotate(x):
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)

    def turn(q, k, cos, sin, **_):
        half = cos.shape[-1] // 2
        cos, sin = (t[..., :half].repeat_interleave(2, -1)[:, None] for t in (cos, sin))
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin

    patch.setattr(modeling_llama, "apply_rotary_pos_emb", turn)


def other_way(model, patch):
    right = modeling_llama.rotate_half
    patch.setattr(modeling_llama, "rotate_half", lambda x: -right(x))


def theta(model, patch):
    frequencies = 500000.0 ** (-torch.arange(0, 8, 2) / 8)
    model.model.rotary_emb.inv_freq = frequencies


def late_positions(model, patch):
    rotary = model.model.rotary_emb
    right = rotary.forward
    patch.setattr(rotary, "forward", lambda x, position_ids: right(x, position_ids + 1))


def narrow_phases(model, patch):
    rotary = model.model.rotary_emb

    def forward(x, position_ids):
        phases = position_ids[..., None].bfloat16() * rotary.inv_freq.bfloat16()
        phases = torch.cat([phases, phases], -1).float()
        return phases.cos(), phases.sin()

    patch.setattr(rotary, "forward", forward)


def no_scaling(model, patch):
    model.model.rotary_emb.inv_freq = 10000.0 ** (-torch.arange(0, 8, 2) / 8)


def permuted_keys(model, patch):
    weight = attention_of(model).k_proj.weight
    weight.data = rows_moved(weight.data, 4)


def permuted_keys_of_all_heads(model, patch):
    """Keys of a GGUF file, put back as if they had as many heads as the queries."""
    weight = attention_of(model).k_proj.weight
    stored = rows_moved(weight.data, 4)
    weight.data = stored.reshape(8, -1, 2, 64).swapaxes(1, 2).reshape(weight.shape)


def transposed(model, patch):
    weight = attention_of(model).o_proj.weight
    weight.data = weight.data.T.contiguous()


def keys_and_values(model, patch):
    block = attention_of(model)
    block.k_proj, block.v_proj = block.v_proj, block.k_proj


def heads_reversed(model, patch):
    weight = attention_of(model).q_proj.weight
    weight.data = weight.data.reshape(8, 8, 64).flip(0).reshape(64, 64).contiguous()


def tiled(model, patch):
    patch.setattr(modeling_llama, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))


def no_bias(model, patch):
    attention_of(model).v_proj.bias.data.zero_()


def small_eps(model, patch):
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-5


def norm_changed(change):
    def apply(model, patch):
        norm = model.model.layers[1].post_attention_layernorm
        patch.setattr(norm, "forward", lambda x: change(norm, x))

    return apply


def eps_outside(norm, x):
    return norm.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + norm.variance_epsilon)


def plus_one(norm, x):
    root = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return (1 + norm.weight) * x / root


def no_weight(norm, x):
    return x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def centred(norm, x):
    x = x - x.mean(-1, keepdim=True)
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def scale(factor):
    def apply(model, patch):
        for layer in model.model.layers:
            layer.self_attn.scaling = factor

    return apply


def mask_changed(change):
    """Another additive mask than the causal one."""

    def apply(model, patch):
        def made(*args, **kwargs):
            seen = change(torch.ones(12, 12, dtype=torch.bool))
            return torch.where(seen, 0.0, -math.inf)[None, None]

        patch.setattr(modeling_llama, "create_causal_mask", made)

    return apply


def softmax_of_queries(model, patch):
    right = torch.nn.functional.softmax
    patch.setattr(
        torch.nn.functional,
        "softmax",
        lambda x, dim, **options: right(x, dim=-2, **options).nan_to_num(),
    )


def activation(function):
    def apply(model, patch):
        for layer in model.model.layers:
            patch.setattr(layer.mlp, "act_fn", function)

    return apply


def gate_and_up(model, patch):
    block = model.model.layers[1].mlp
    block.gate_proj, block.up_proj = block.up_proj, block.gate_proj


def residual_after_norm(model, patch):
    layer = model.model.layers[1]

    def forward(hidden_states, **options):
        x = layer.input_layernorm(hidden_states)
        x = x + layer.self_attn(hidden_states=x, **options)[0]
        return x + layer.mlp(layer.post_attention_layernorm(x))

    patch.setattr(layer, "forward", forward)


def no_residual(model, patch):
    layer = model.model.layers[1]

    def forward(hidden_states, **options):
        x = layer.input_layernorm(hidden_states)
        x = hidden_states + layer.self_attn(hidden_states=x, **options)[0]
        return layer.mlp(layer.post_attention_layernorm(x))

    patch.setattr(layer, "forward", forward)


def tied(model, patch):
    model.lm_head.weight.data = model.model.embed_tokens.weight.data


def scaled_embedding(model, patch):
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: output * 8.0)


def earlier_layer(model, patch):
    attention_of(model, 1).o_proj.load_state_dict(attention_of(model, 0).o_proj.state_dict())


def rounded_inputs(model, patch):
    """Products of 11 bits, as TF32 has them."""
    linear = model.model.layers[1].mlp.down_proj

    def tf32(x):
        bits = x.detach().contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    patch.setattr(linear, "forward", lambda x: tf32(x) @ tf32(linear.weight).T)


BUGS = {
    "interleaved": (interleaved, "self_attn.q_rope", "RoPE layout interleaved"),
    "other way": (other_way, "self_attn.q_rope", "RoPE rotated the other way"),
    "theta": (theta, "self_attn.q_rope", "another rope_theta"),
    "late positions": (late_positions, "self_attn.q_rope", "RoPE position off by one"),
    "narrow phases": (narrow_phases, "self_attn.q_rope", "RoPE phases in bfloat16"),
    "no scaling": (no_scaling, "self_attn.q_rope", "RoPE scaling ignored"),
    "permuted keys": (permuted_keys, "self_attn.k_proj", "RoPE permutation left in"),
    "permuted as queries": (
        permuted_keys_of_all_heads,
        "self_attn.k_proj",
        "RoPE permutation with the wrong head count",
    ),
    "transposed": (transposed, "self_attn.o_proj", "weight transposed"),
    "keys and values": (keys_and_values, "self_attn.k_proj", "keys and values swapped"),
    "heads reversed": (heads_reversed, "self_attn.q_proj", "heads in reverse order"),
    "tiled": (tiled, "self_attn.attention", "key heads tiled"),
    "no bias": (no_bias, "self_attn.v_proj", "bias missing"),
    "small eps": (small_eps, "input_layernorm", "another eps"),
    "eps outside": (
        norm_changed(eps_outside),
        "post_attention_layernorm",
        "eps outside the root",
    ),
    "plus one": (norm_changed(plus_one), "post_attention_layernorm", "norm weight plus one"),
    "no weight": (norm_changed(no_weight), "post_attention_layernorm", "norm weight skipped"),
    "centred": (norm_changed(centred), "post_attention_layernorm", "mean subtracted"),
    "no scale": (scale(1.0), "self_attn.attention", "another scale of scores"),
    "scaled twice": (scale(1 / 8), "self_attn.attention", "another scale of scores"),
    "no mask": (mask_changed(lambda x: x), "self_attn.attention", "no causal mask"),
    "sees the next": (
        mask_changed(lambda x: x.tril(1)),
        "self_attn.attention",
        "a token sees the next",
    ),
    "softmax of queries": (
        softmax_of_queries,
        "self_attn.attention",
        "softmax over the queries",
    ),
    "gelu": (activation(torch.nn.GELU()), "mlp.act", "gelu for silu"),
    "gate and up": (gate_and_up, "mlp.gate_proj", "gate and up swapped"),
    "residual after norm": (
        residual_after_norm,
        "attention_residual",
        "residual from the wrong place",
    ),
    "no residual": (no_residual, "layer", "residual missing"),
    "tied": (tied, "lm_head", "embedding used as the head"),
    "scaled embedding": (
        scaled_embedding,
        "model.embed_tokens",
        "embedding scaled by the root of hidden_size",
    ),
    "earlier layer": (earlier_layer, "self_attn.o_proj", "another layer's weights"),
    "TF32": (rounded_inputs, "mlp.down_proj", "inputs rounded to TF32"),
}


KINDS = {"plain": {}, "scaled and biased": {"rope_parameters": LLAMA3, "attention_bias": True}}
# A model without a scaling or bias cannot lose it; where frequencies are scaled, another theta
# would be two bugs.
ONLY = {"no scaling": "scaled and biased", "no bias": "scaled and biased", "theta": "plain"}


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory):
    """A random checkpoint of a kind, with weights that a mistake changes."""
    options = KINDS[request.param]
    config = transformers.LlamaConfig(**SIZES, **options)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape)
        if name.endswith("norm.weight"):
            drawn = 1 + drawn / 4
        elif parameter.ndim == 2 and "embed" not in name:
            drawn = drawn / math.sqrt(parameter.shape[1])
        parameter.data = drawn
    directory = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(directory)
    return directory


def opened(directory: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager"
    ).eval()


IDS = np.random.default_rng(0).integers(0, 96, (1, 12))


@pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
def test_nothing_without_a_bug(checkpoint):
    report = check(record_transformers(opened(checkpoint), torch.asarray(IDS)), load(checkpoint))
    assert report.agrees
    assert not any(result.explanations for result in report.results)


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [(kind, name) for kind in KINDS for name in BUGS if ONLY.get(name, kind) == kind],
    indirect=["checkpoint"],
)
def test_found_and_named(checkpoint, name, monkeypatch):
    plant, role, cause = BUGS[name]
    peer = opened(checkpoint)
    with torch.no_grad():
        plant(peer, monkeypatch)
        trace = record_transformers(peer, torch.asarray(IDS))
    report = check(trace, load(checkpoint))
    assert report.first is not None
    assert report.first.site.role == role
    assert report.first.explanations, report
    names = [explanation.name for explanation in report.first.explanations]
    assert cause in names, report
    # Of numbers like these, float16 has as many bits as TF32.
    assert names[0] == cause or set(names) == {cause, "inputs rounded to float16"}, report
