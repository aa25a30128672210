"""Names that engines give to arrays which are not sites, and what to do with each."""

from __future__ import annotations

import re

from llama_layers.verify.aliases import plain_name, split_number

_BEFORE_WEIGHT = "a row before it is multiplied with the weight"
# By name, with {} for the number of a layer: llama.cpp, TransformerLens, Hugging Face, Meta.
_NAMES = {
    "norm-{}": _BEFORE_WEIGHT,
    "norm": f"{_BEFORE_WEIGHT}, in llama.cpp",
    "kq-{}": "scores before they are scaled",
    "kqv-{}": "self_attn.attention with its axes in another order",
    "kqv_merged-{}": "self_attn.attention with its axes in another order",
    "kqv_merged_cont-{}": "in older versions of llama.cpp this is self_attn.attention, and kqv_out "
    "is self_attn.o_proj: rename both",
    "kqv_wo-{}": "self_attn.o_proj before its bias",
    "__fattn__-{}": "self_attn.attention with its axes in another order",
    "q-{}": "queries after RoPE with their axes in another order: write Qcur-{}",
    "k-{}": "all cached keys with their axes in another order",
    "v-{}": "all cached values with their axes in another order",
    "ffn_silu-{}": "silu(gate) alone; mlp.act is its product with mlp.up_proj",
    "inp_tokens": "input_ids",
    "inp_pos": "positions",
    "KQ_mask": "the mask of attention",
    "prompt_logprobs": "number s is that of token s; leave out the first, and call it logprobs",
    "input_token_logprobs": "number s is of token s; leave out the first, and call it logprobs",
    "cumulative_logprob": "a sum of logprobs",
    "blocks.{}.ln1.hook_normalized": _BEFORE_WEIGHT,
    "blocks.{}.ln2.hook_normalized": _BEFORE_WEIGHT,
    "ln_final.hook_normalized": _BEFORE_WEIGHT,
    "blocks.{}.hook_resid_pre": "what the layer before it gives",
    "blocks.{}.hook_attn_in": "what the layer before it gives, once for each head",
    "blocks.{}.hook_mlp_in": "attention_residual once more",
    "blocks.{}.attn.hook_result": "self_attn.o_proj in a part for each head",
    "model.layers.{}.self_attn": "self_attn.o_proj once more",
    "model.layers.{}.mlp": "mlp.down_proj once more",
    "model": "model.norm once more",
    "layers.{}.attention": "layers.{}.attention.wo once more",
    "layers.{}.feed_forward": "layers.{}.feed_forward.w2 once more",
}
_QKV = (
    "queries, keys and values in one array: split it into self_attn.q_proj, self_attn.k_proj and "
    "self_attn.v_proj"
)
_GATE_UP = "gate and up in one array: split it into mlp.gate_proj and mlp.up_proj"
_TABLE = "the cosines and sines of RoPE"
_CACHE = (
    "a cache; keys after RoPE and values of earlier tokens are written as "
    "self_attn.past_key and self_attn.past_value, [B, tokens, kv_heads, head_dim]"
)
# By the last word of the name.
_WORDS = {
    **dict.fromkeys(
        ("qkv_proj", "qkv", "qkv_linear", "wqkv", "query_key_value", "in_proj", "attn_qkv"), _QKV
    ),
    "c_attn": _QKV,
    "w_pack": _QKV,
    **dict.fromkeys(("gate_up_proj", "gate_up", "gate_and_up_proj", "w13", "w1_w3"), _GATE_UP),
    "act_fn": "silu(gate) alone, in transformers; mlp.act is its product with mlp.up_proj. Only in "
    "vLLM and SGLang, where gate_up_proj stands before it, is it mlp.act: rename it there",
    "silu": "silu(gate) alone; mlp.act is its product with mlp.up_proj",
    "rotary_emb": f"{_TABLE} in transformers, queries and keys after RoPE in vLLM: write those as "
    "self_attn.q_rope and self_attn.k_rope",
    "rope": "queries in one call and keys in the next, in mlx: write self_attn.q_rope and "
    "self_attn.k_rope",
    "rotary_fn": "queries and keys after RoPE: write self_attn.q_rope and self_attn.k_rope",
    **dict.fromkeys(("freqs_cis", "inv_freq", "cos", "sin", "cos_cached", "sin_cached"), _TABLE),
    "self_attn": "self_attn.o_proj once more",
    "attn": "self_attn.o_proj once more, if it is a whole block of attention",
    "mlp": "mlp.down_proj once more",
    "feed_forward": "mlp.down_proj once more",
    "layers": "a list of modules, which gives nothing",
    **dict.fromkeys(("q_norm", "k_norm"), "this model's config has no norm of queries and keys"),
    **dict.fromkeys(("dropout", "resid_dropout", "attn_dropout"), "dropout is off in a right run"),
    "logits_processor": "lm_head once more, if it neither scales nor caps",
    "sampler": "what follows the logits",
    "hook_scale": "what the rows of a norm are divided by",
    **dict.fromkeys(
        ("k_cache", "v_cache", "key_cache", "value_cache", "cache_k", "cache_v"), _CACHE
    ),
    **dict.fromkeys(("weight", "bias"), "a weight; a trace holds activations"),
    **dict.fromkeys(
        ("weight_scale", "weight_packed", "qweight", "qzeros", "scales", "g_idx"),
        "a weight; a trace holds activations",
    ),
}
# By the whole name.
_PATTERNS = {
    r"(?:cache_[kv]_l|[kv]_cache_view-)\d+.*": _CACHE,
    r"(?:past_key_values?|present(?:_key_values?)?)[._]\d.*": _CACHE,
    r"(?:node|leaf)_\d+.*": "a tensor of llama.cpp without a name",
    r"(.+) \((?:reshaped|view|permuted|copy|cont|transposed|copy of .*)\)(?: \(.*\))?": "{} in "
    "another order or shape",
    r"(.+)\.input(?:[._]?\d|\[\d\])?": "what another module gives: write the output of that",
}


def no_site(name: str) -> str | None:
    """Say what an array is that looks like a site's and is not; None if it is not known."""
    template, number = split_number(name)
    for tried in (template, plain_name(template)):
        for candidate in (tried, f"model.{tried}"):
            if (reason := _NAMES.get(candidate)) is not None:
                return reason.replace("{}", number)
    for pattern, reason in _PATTERNS.items():
        if (found := re.fullmatch(pattern, name[:1000], re.DOTALL)) is not None:
            return reason.format(*found.groups()) if found.groups() else reason
    return _WORDS.get(plain_name(name[:1000]).rpartition(".")[2].lower())
