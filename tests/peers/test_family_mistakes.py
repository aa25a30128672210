"""Mistakes in a family's own switches, made in transformers: found at their site, and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.ernie4_5 import modeling_ernie4_5
from transformers.models.granite_swa import modeling_granite_swa
from transformers.models.llama import modeling_llama
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.qwen3 import modeling_qwen3

from llama_layers import load
from llama_layers.verify import check
from llama_layers.verify.recorders import record_transformers
from tests.support.families import CASES, opened, written

pytestmark = pytest.mark.peer

FAMILIES = CASES | {"qwen3": ("qwen3", {"head_dim": 8})}
IDS = np.random.default_rng(0).integers(0, 61, (2, 12))


def layer_of(model: Any, layer: int = 1) -> Any:
    return model.model.layers[layer]


def root(x: Any, eps: float, dims: Any = -1) -> Any:
    return (x.square().mean(dims, keepdim=True) + eps).sqrt()


def no_plus_one(model, patch):
    norm = layer_of(model).input_layernorm
    patch.setattr(norm, "forward", lambda x: x / root(x, norm.eps) * norm.weight)


def embedding_scale(factor):
    def apply(model, patch):
        table = model.model.embed_tokens
        patch.setattr(table, "forward", lambda ids: table.weight[ids] * factor)

    return apply


def changed(module, name, change):
    """An attribute of a module of layer 1 that is another."""

    def apply(model, patch):
        block = layer_of(model).get_submodule(module)
        patch.setattr(block, name, change(block))

    return apply


def no_query_scalar(block):
    return block.head_dim**-0.5


def logits(change):
    """A head that changes what its matrix gives in another way."""

    def apply(model, patch):
        def forward(input_ids, **options):
            products = model.lm_head(model.model(input_ids, **options).last_hidden_state)
            return CausalLMOutput(logits=change(products, model.config))

        patch.setattr(model, "forward", forward)

    return apply


def local_theta(model, patch):
    rotary = model.model.rotary_emb
    right = rotary.forward
    patch.setattr(rotary, "forward", lambda x, at, _: right(x, at, "sliding_attention"))


def norm_after_rope(model, patch):
    turn, table = modeling_qwen3.apply_rotary_pos_emb, model.model.rotary_emb.forward

    def after(right):
        def forward(x):
            cos, sin = table(x, torch.arange(x.shape[1])[None])
            return right(turn(x, x, cos, sin, unsqueeze_dim=2)[0])

        return forward

    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            patch.setattr(norm, "forward", after(norm.forward))
    patch.setattr(modeling_qwen3, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))


def norm_over_all_heads(model, patch):
    norm = layer_of(model).self_attn.q_norm
    eps = norm.variance_epsilon
    patch.setattr(norm, "forward", lambda x: x / root(x, eps, (-2, -1)) * norm.weight)


def norm_of_each_head(model, patch):
    norm = layer_of(model).self_attn.k_norm

    def forward(x):
        heads = x.unflatten(-1, (-1, layer_of(model).self_attn.head_dim))
        return (heads / root(heads, norm.variance_epsilon)).flatten(-2) * norm.weight

    patch.setattr(norm, "forward", forward)


def norm_before(model, patch):
    layer = layer_of(model)

    def forward(x, **options):
        x = x + layer.self_attn(hidden_states=layer.post_attention_layernorm(x), **options)[0]
        return x + layer.mlp(layer.post_feedforward_layernorm(x))

    patch.setattr(layer, "forward", forward)


def norm_of_the_sum(model, patch):
    layer = layer_of(model)

    def forward(x, **options):
        x = layer.post_attention_layernorm(x + layer.self_attn(hidden_states=x, **options)[0])
        return layer.post_feedforward_layernorm(x + layer.mlp(x))

    patch.setattr(layer, "forward", forward)


def embedding_divided(model, patch):
    patch.setattr(model.model, "embedding_multiplier", 1 / model.model.embedding_multiplier)


def rope_everywhere(model, patch):
    patch.setattr(layer_of(model, 3).self_attn, "use_rope", 1)


def rope_on_global_layers(model, patch):
    patch.setattr(layer_of(model, 3).self_attn, "sliding_window", None)


def all_channels(model, patch):
    width = model.config.head_dim
    frequencies = 10000.0 ** (-torch.arange(0, width, 2) / width)

    def forward(x, position_ids):
        phases = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return phases.cos(), phases.sin()

    patch.setattr(model.model.rotary_emb, "forward", forward)


def pairs_of_halves(model, patch):
    patch.setattr(modeling_ernie4_5, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def no_sinks(model, patch):
    patch.setattr(
        modeling_granite_swa, "eager_attention_forward", modeling_llama.eager_attention_forward
    )


def no_temperature(model, patch):
    patch.setattr(modeling_ministral3, "get_llama_4_attn_scale", lambda *_: torch.ones(()))


ATTENTION = "model.layers.1.self_attn"
SCALE = "another scale of scores"
# The family, the mistake, the first wrong site, and the mistake's name.
MISTAKES = {
    "gemma, no plus one": (
        no_plus_one,
        "model.layers.1.input_layernorm",
        "norm weight without its plus one",
    ),
    "gemma, no factor": (
        embedding_scale(1.0),
        "model.embed_tokens",
        "embedding not multiplied",
    ),
    "gemma, rounded factor": (
        embedding_scale(5.65625),
        "model.embed_tokens",
        "embedding multiplier rounded otherwise",
    ),
    "gemma, silu": (
        changed("mlp.act_fn", "forward", lambda _: torch.nn.functional.silu),
        "model.layers.1.mlp.act",
        "silu for gelu",
    ),
    "gemma2, no cap of scores": (
        changed("self_attn", "attn_logit_softcapping", lambda _: None),
        f"{ATTENTION}.attention",
        "cap of scores missing",
    ),
    "gemma2, no cap of logits": (
        logits(lambda y, _: y),
        "logits",
        "cap of logits missing",
    ),
    "gemma2, head_dim": (
        changed("self_attn", "scaling", no_query_scalar),
        f"{ATTENTION}.attention",
        SCALE,
    ),
    "gemma3_text, another cap": (
        logits(lambda y, _: 30 * torch.tanh(y / 30)),
        "logits",
        "another cap of logits",
    ),
    "gemma3_text, local theta": (local_theta, f"{ATTENTION}.q_rope", "RoPE of another layer"),
    "qwen3, norm after RoPE": (
        norm_after_rope,
        "model.layers.0.self_attn.q_norm",
        "norm after RoPE",
    ),
    "qwen3, all heads": (
        norm_over_all_heads,
        f"{ATTENTION}.q_norm",
        "norm over the wrong width",
    ),
    "olmo2, each head": (
        norm_of_each_head,
        f"{ATTENTION}.k_norm",
        "normalised over a share of the channels",
    ),
    "olmo2, norm before": (norm_before, f"{ATTENTION}.q_proj", "input from the wrong place"),
    "olmo2, norm of the sum": (
        norm_of_the_sum,
        "model.layers.1.post_attention_layernorm",
        "norm of the sum",
    ),
    "granite, no residual multiplier": (
        changed("", "residual_multiplier", lambda _: 1.0),
        "model.layers.1.attention_residual",
        "residual multiplier left out",
    ),
    "granite, head_dim": (
        changed("self_attn", "scaling", no_query_scalar),
        f"{ATTENTION}.attention",
        SCALE,
    ),
    "granite, embedding divided": (
        embedding_divided,
        "model.embed_tokens",
        "another embedding multiplier",
    ),
    "granite, logits multiplied": (
        logits(lambda y, config: y * config.logits_scaling),
        "logits",
        "logits scaling multiplies",
    ),
    "hyperclovax, logits divided": (
        logits(lambda y, config: y / config.logits_scaling),
        "logits",
        "logits scaling multiplies",
    ),
    "smollm3, RoPE everywhere": (
        rope_everywhere,
        "model.layers.3.self_attn.q_rope",
        "RoPE on a layer without it",
    ),
    "exaone4, RoPE everywhere": (
        rope_on_global_layers,
        "model.layers.3.self_attn.q_rope",
        "RoPE on a layer without it",
    ),
    "glm, all channels": (all_channels, "model.layers.0.self_attn.q_rope", "partial RoPE"),
    "ernie4_5, pairs of halves": (
        pairs_of_halves,
        "model.layers.0.self_attn.q_rope",
        "RoPE layout half",
    ),
    "granite_swa, no sinks": (
        no_sinks,
        "model.layers.0.self_attn.attention",
        "sinks left out",
    ),
    "ministral3, no temperature": (
        no_temperature,
        "model.layers.0.self_attn.q_rope",
        "query temperature missing",
    ),
}


def family_of(name: str) -> str:
    return name.partition(",")[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model of a family in transformers and here, made when first asked for."""
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            directory = written(tmp_path_factory.mktemp("family"), *FAMILIES[family])
            made[family] = opened(directory), load(directory)
        return made[family]

    return get


@pytest.mark.parametrize("family", dict.fromkeys(map(family_of, MISTAKES)))
def test_nothing_without_a_mistake(models, family):
    peer, ours = models(family)
    report = check(record_transformers(peer, IDS), ours)
    assert report.agrees, report
    assert not any(result.explanations for result in report.results)


@pytest.mark.parametrize("name", MISTAKES)
def test_found_and_named(models, monkeypatch, name):
    plant, site, cause = MISTAKES[name]
    peer, ours = models(family_of(name))
    with torch.no_grad():
        plant(peer, monkeypatch)
        trace = record_transformers(peer, IDS)
    report = check(trace, ours)
    assert report.first is not None
    assert report.first.site.name == site
    names = [explanation.name for explanation in report.first.explanations]
    assert names[:1] == [cause], report
