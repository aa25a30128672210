"""Small random models, with their weights by Hugging Face name for the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llama_layers import (
    AttentionWeights,
    KVCache,
    LayerWeights,
    Llama,
    LlamaConfig,
    LlamaWeights,
    MLPWeights,
    QKVWeights,
    forward,
)
from llama_layers.arrays.transfer import to_numpy
from llama_layers.checkpoint import expected_tensors
from tests.support.decoder_oracle import called


def unmoved(array):
    return array


# Grouped heads whose number times head_dim is not hidden_size.
GQA = LlamaConfig(
    vocab_size=13,
    hidden_size=10,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-2,
    rope_theta=100.0,
    max_position_embeddings=8,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "gqa": GQA,
    "mha": replace(GQA, num_key_value_heads=4),
    "mqa": replace(GQA, num_key_value_heads=1, num_hidden_layers=3),
    "biases": replace(GQA, attention_bias=True, mlp_bias=True),
    "qwen2": replace(GQA, model_type="qwen2"),
    "qwen3": replace(GQA, model_type="qwen3", qk_norm="head"),
    "norms of projections": replace(GQA, qk_norm="full"),
    "norms on both sides": replace(GQA, norm_placement="both"),
    "olmo2": replace(GQA, model_type="olmo2", norm_placement="after", qk_norm="full"),
    "norms after RoPE": replace(GQA, qk_norm="head", qk_norm_weight=False, qk_norm_after_rope=True),
    "multipliers": replace(
        GQA,
        model_type="granite",
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
        residual_multiplier=0.7,
        logits_scaling=1.7,
    ),
    "sinks": replace(GQA, attention_sinks=True, sliding_window=3),
    "gemma": replace(
        GQA,
        embedding_multiplier=3.3,
        embedding_multiplier_rounded=True,
        norm_weight_offset=1.0,
        hidden_act="gelu_pytorch_tanh",
        attn_logit_softcapping=0.7,
        final_logit_softcapping=2.0,
        qk_norm="head",
    ),
    "tied": replace(GQA, tie_word_embeddings=True),
    "window": replace(GQA, model_type="mistral", sliding_window=3),
    "window of one": replace(GQA, model_type="mistral", sliding_window=1),
    "some windows": replace(
        GQA,
        sliding_window=2,
        num_hidden_layers=3,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    ),
    "linear": replace(GQA, rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "dynamic": replace(GQA, rope_scaling={"rope_type": "dynamic", "factor": 3.0}),
    "yarn": replace(GQA, head_dim=8, rope_scaling=YARN),
    "llama3": replace(GQA, head_dim=8, rope_scaling=LLAMA3),
    "longrope": replace(
        GQA,
        llama_4_scaling_beta=0.5,
        rope_scaling={
            "rope_type": "longrope",
            "factor": 2.0,
            "original_max_position_embeddings": 4,
            "short_factor": (1.0, 1.5),
            "long_factor": (1.25, 6.0),
        },
    ),
    "RoPE by layer": replace(
        GQA,
        head_dim=8,
        sliding_window=2,
        num_hidden_layers=3,
        layer_types=("sliding_attention", "full_attention", "full_attention"),
        layer_rope_theta=(10.0, 100.0, 0.0),
        sliding_rope_scaling=False,
        partial_rotary_factor=0.5,
        rope_scaling={"rope_type": "linear", "factor": 3.0},
    ),
}

# Each switch of the block alone, or with what it needs, in layers whose arrays are Llama's.
SAME_ARRAYS = {
    "qk_norm_weight": replace(GQA, qk_norm="head", qk_norm_weight=False),
    "attention_multiplier": replace(GQA, attention_multiplier=0.3),
    "residual_multiplier": replace(GQA, residual_multiplier=0.7),
    "norm_weight_offset": replace(GQA, norm_weight_offset=1.0),
    "hidden_act": replace(GQA, hidden_act="gelu_pytorch_tanh"),
    "attn_logit_softcapping": replace(GQA, attn_logit_softcapping=0.7),
    "layer_rope_theta": replace(GQA, layer_rope_theta=(100.0, 10.0)),
    "sliding_rope_scaling": replace(
        GQA,
        sliding_window=3,
        layer_types=("sliding_attention", "full_attention"),
        sliding_rope_scaling=False,
        rope_scaling={"rope_type": "linear", "factor": 3.0},
    ),
    "partial_rotary_factor": replace(GQA, partial_rotary_factor=0.5),
    "llama_4_scaling_beta": replace(GQA, llama_4_scaling_beta=0.5),
}
ONE_SWITCH = SAME_ARRAYS | {
    "norm_placement": replace(GQA, norm_placement="both"),
    "qk_norm": replace(GQA, qk_norm="head"),
    "qk_norm_after_rope": replace(GQA, qk_norm="head", qk_norm_after_rope=True),
    "attention_sinks": replace(GQA, attention_sinks=True),
    # These are not of the layers.
    "embedding_multiplier": replace(GQA, embedding_multiplier=3.0),
    "embedding_multiplier_rounded": replace(
        GQA, embedding_multiplier=3.3, embedding_multiplier_rounded=True
    ),
    "logits_scaling": replace(GQA, logits_scaling=1.7),
    "final_logit_softcapping": replace(GQA, final_logit_softcapping=2.0),
}


# Those of Llama's own block, which compiled bodies compute whole.
PLAIN = [kind for kind, config in CONFIGS.items() if not config.switches]
# Narrow formats are rounded alike in each kind: a few of them tell.
KINDS_AND_DTYPES = [
    *((kind, "float32") for kind in PLAIN),
    *((kind, dtype) for dtype in ("bfloat16", "float16") for kind in ("gqa", "biases", "window")),
]


def random_weights(config, seed=0, dtype=np.float64):
    """Matrices that keep a row's size, biases and norm weights that make a difference."""
    rng = np.random.default_rng(seed)

    def drawn(name, shape):
        numbers = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            return 1 + numbers / 4
        return numbers if len(shape) == 1 or "embed" in name else numbers / np.sqrt(shape[-1])

    shapes = expected_tensors(config)
    return {name: drawn(name, shape).astype(dtype) for name, shape in shapes.items()}


def layer_weights(weights, config, layer, array=unmoved):
    def get(name):
        found = weights.get(f"model.layers.{layer}.{name}")
        return None if found is None else array(found)

    def norm(role, where="both"):
        there = "both" in (where, config.norm_placement) or where == config.norm_placement
        return get(f"{called(config, role)}.weight") if there else None

    q, k, v = (get(f"self_attn.{x}_proj.weight") for x in "qkv")
    biases = [get(f"self_attn.{x}_proj.bias") for x in "qkv"]
    qkv = QKVWeights.from_separate(
        *(q, k, v),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        biases=None if biases[0] is None else biases,
    )
    matrices = (get(f"mlp.{x}_proj.weight") for x in ("gate", "up", "down"))
    mlp_biases = (get(f"mlp.{x}_proj.bias") for x in ("gate", "up", "down"))
    return LayerWeights(
        norm("input_layernorm", "before"),
        AttentionWeights(
            qkv,
            get("self_attn.o_proj.weight"),
            get("self_attn.o_proj.bias"),
            norm("self_attn.q_norm"),
            norm("self_attn.k_norm"),
            get("self_attn.sinks"),
        ),
        norm("post_attention_layernorm", "before"),
        MLPWeights(*matrices, *mlp_biases),
        norm("post_self_attn_layernorm", "after"),
        norm("post_mlp_layernorm", "after"),
    )


def model_of(config, weights, array=unmoved):
    embedding = array(weights["model.embed_tokens.weight"])
    tied = config.tie_word_embeddings
    return Llama(
        config,
        LlamaWeights(
            embedding,
            [
                layer_weights(weights, config, layer, array)
                for layer in range(config.num_hidden_layers)
            ],
            array(weights["model.norm.weight"]),
            embedding if tied else array(weights["lm_head.weight"]),
        ),
    )


def run_in_chunks(
    model, ids, cuts, *, keep=None, rule=None, array=unmoved, rolling=None, max_len=None
):
    """The logits [B, S, vocab_size] of ids [B, S] fed from cut to cut through a cache.

    `rule` [S, S] or [B, S, S] is a mask, of which each pass gets the columns of all tokens so far.
    """
    batch, count = ids.shape
    cache = KVCache.create(model, batch, max_len or count, rolling=rolling)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        mask = None if keep is None else array(keep[:, start:stop])
        chunk = array(ids[:, start:stop])
        own = None if rule is None else array(np.ascontiguousarray(rule[..., start:stop, :stop]))
        output = forward(model, chunk, cache=cache, attention_mask=mask, mask=own)
        cache = output.cache
        parts.append(to_numpy(output.logits))
    assert cache.length == count
    return np.concatenate(parts, axis=1)


def ways(count, rng):
    """Cuts of a sequence: all at once, somewhere, and token by token."""
    somewhere = sorted(rng.choice(np.arange(1, count), size=min(2, count - 1), replace=False))
    return {"whole": [], "chunks": [int(c) for c in somewhere], "tokens": list(range(1, count))}
