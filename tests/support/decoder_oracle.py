"""The decoder again, one sequence without padding at a time, in float64 and naive loops.

Formulas are from the papers and from the model code that Meta and the authors of YaRN published;
none of it is taken from the package.
"""

from __future__ import annotations

import math

import numpy as np


def frequencies(config, length=None, layer=0):
    """Radians a position for each pair of channels, and the factor on cosines and sines."""
    theta, scaling = config.rope_theta, config.rope_scaling
    dim = int(config.head_dim * config.partial_rotary_factor)
    if config.layer_rope_theta is not None:
        theta = config.layer_rope_theta[layer]
    if not config.sliding_rope_scaling and config.window_of(layer) is not None:
        scaling = None
    pairs = range(dim // 2)
    plain = [1.0 / math.pow(theta, 2 * i / dim) for i in pairs]
    if scaling is None:
        return plain, 1.0
    factor = scaling.factor
    trained = scaling.original_max_position_embeddings or config.max_position_embeddings
    if scaling.rope_type == "linear":
        return [f / factor for f in plain], 1.0
    if scaling.rope_type == "dynamic":
        if length is None or length <= trained or dim == 2:  # one pair: theta**0, of any theta
            return plain, 1.0
        stretch = 1 + factor * (length - trained) / trained
        base = theta * stretch ** (dim / (dim - 2))
        return [1.0 / math.pow(base, 2 * i / dim) for i in pairs], 1.0
    if scaling.rope_type == "llama3":
        return [_llama3(f, scaling, trained) for f in plain], 1.0
    if scaling.rope_type == "longrope":
        beyond = length is not None and length > trained
        by = scaling.long_factor if beyond else scaling.short_factor
        return [f / d for f, d in zip(plain, by, strict=True)], _longrope_factor(scaling)
    return [_yarn(i, plain[i], scaling, trained, theta, dim) for i in pairs], _yarn_factor(scaling)


def _llama3(frequency, scaling, trained):
    wavelength = 2 * math.pi / frequency
    if wavelength < trained / scaling.high_freq_factor:
        return frequency
    if wavelength > trained / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (trained / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _longrope_factor(scaling):
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return (1 + math.log(scaling.factor, scaling.original_max_position_embeddings)) ** 0.5


def _yarn(i, frequency, scaling, trained, theta, dim):
    def pair_with(turns):
        """The real-valued i for which trained / wavelength is that many turns, by bisection."""
        low, high = -1000.0 * dim, 1000.0 * dim
        for _ in range(200):
            middle = (low + high) / 2
            exponent = 2 * middle / dim
            if math.log(trained / (2 * math.pi)) - exponent * math.log(theta) > (math.log(turns)):
                low = middle
            else:
                high = middle
        return (low + high) / 2

    start = pair_with(scaling.beta_fast if scaling.beta_fast is not None else 32)
    end = pair_with(scaling.beta_slow if scaling.beta_slow is not None else 1)
    if scaling.truncate is None or scaling.truncate:
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, dim - 1)
    if start == end:
        end = start + 0.001
    ramp = min(1.0, max(0.0, (i - start) / (end - start)))
    return ramp * frequency / scaling.factor + (1 - ramp) * frequency


def _yarn_factor(scaling):
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    log = math.log(scaling.factor)
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (1 + log * scaling.mscale / 10) / (1 + log * scaling.mscale_all_dim / 10)
    return 1 + log / 10


def turn(vector, position, config, length=None, layer=0):
    """One head of one token, turned: channels i and i + R / 2 are the pair i, of the first R."""
    if config.layer_rope_theta is not None and config.layer_rope_theta[layer] == 0:
        return vector
    turned = np.array(vector, np.float64)
    speeds, factor = frequencies(config, length, layer)
    half = len(speeds)
    for i in range(half):
        cos, sin = math.cos(position * speeds[i]), math.sin(position * speeds[i])
        turned[i] = factor * (vector[i] * cos - vector[i + half] * sin)
        turned[i + half] = factor * (vector[i + half] * cos + vector[i] * sin)
    return turned


def softmax(scores):
    largest = max(scores)
    exponentials = [math.exp(score - largest) for score in scores]
    total = math.fsum(exponentials)
    return [exponential / total for exponential in exponentials]


# What the files of families call norms that have GLM-4's and Qwen3's names below.
_OLMO = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
_GEMMA = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
NAMES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "vaultgemma": {"post_attention_layernorm": "pre_feedforward_layernorm"},
    "hyperclovax": {
        "post_self_attn_layernorm": "post_norm1",
        "post_mlp_layernorm": "post_norm2",
    },
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _OLMO),
    "hunyuan_v1_dense": {
        "self_attn.q_norm": "self_attn.query_layernorm",
        "self_attn.k_norm": "self_attn.key_layernorm",
    },
}


def called(config, role):
    """The name of a module inside a layer."""
    return NAMES.get(config.model_type, {}).get(role, role)


def attention(q, k, v, allowed=None, scale=None, cap=None, change=None, sinks=None):
    """[B, S, heads, D] from loops; allowed[b][s] lists the keys that a query may attend to.

    ``change(h, s, t, probability)`` gives what is used instead of a probability. `sinks` has a
    score for each head that weighs nothing.
    """
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = 1 / math.sqrt(width) if scale is None else scale
    y = np.zeros(q.shape)
    for b in range(batch):
        for s in range(queries):
            seen = list(range(keys)) if allowed is None else allowed[b][s]
            for h in range(heads if seen else 0):
                kv = h // group
                scores = [scale * sum(map(float, q[b, s, h] * k[b, t, kv])) for t in seen]
                if cap is not None:
                    scores = [cap * math.tanh(score / cap) for score in scores]
                more = [] if sinks is None else [float(sinks[h])]
                for weight, t in zip(softmax([*scores, *more]), seen, strict=not more):
                    used = weight if change is None else change(h, s, t, weight)
                    y[b, s, h] += used * v[b, t, kv]
    return y


def silu(x):
    return x / (1 + math.exp(-x)) if x > -700 else 0.0


def gelu(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(row, weight, eps):
    return weight * row / math.sqrt(math.fsum(row * row) / len(row) + eps)


def forward(weights, config, ids, positions=None, lengths=None, mask=None, changes=None):
    """Each site's array, tokens first, of one sequence; "logits" are "lm_head" if not there.

    `lengths` says for each token how many positions were in use when it came ("dynamic" RoPE).
    `mask` [S, S] says which keys a query may attend to, instead of its own and those before it;
    `changes` has functions by layer, as `attention` takes one.
    """
    count, width = len(ids), config.head_dim
    positions = list(range(count)) if positions is None else [int(p) for p in positions]
    lengths = [None] * count if lengths is None else [int(n) for n in lengths]
    sites = {}

    def linear(name, rows):
        bias = weights.get(f"{name}.bias")
        sites[name] = np.array(
            [weights[f"{name}.weight"] @ row + (0.0 if bias is None else bias) for row in rows]
        )
        return sites[name]

    def normed(name, rows):
        weight = weights.get(f"{name}.weight", 1.0 - config.norm_weight_offset)
        weight = weight + config.norm_weight_offset
        sites[name] = np.array([rms_norm(row, weight, config.rms_norm_eps) for row in rows])
        return sites[name]

    def normed_heads(name, rows, heads):
        if config.qk_norm == "full":
            return normed(name, rows.reshape(count, -1)).reshape(count, heads, width)
        flat = normed(name, rows.reshape(count * heads, width))
        sites[name] = flat.reshape(count, heads, width)
        return sites[name]

    def turned(name, rows, heads):
        split = rows.reshape(count, heads, width)
        sites[name] = np.array(
            [
                [turn(split[s, h], positions[s], config, lengths[s], layer) for h in range(heads)]
                for s in range(count)
            ]
        )
        return sites[name]

    def warmed(q):
        """Queries, which grow with each trained context that lies before them."""
        scaling = config.rope_scaling
        trained = (
            (scaling and scaling.original_max_position_embeddings)
            or config.llama_4_scaling_context
            or config.max_position_embeddings
        )
        rises = [config.llama_4_scaling_beta * math.log(1 + p // trained) for p in positions]
        return np.array([(1 + rise) * rows for rise, rows in zip(rises, q, strict=True)])

    x = sites["model.embed_tokens"] = np.array(
        [weights["model.embed_tokens.weight"][i] * config.embedding_multiplier for i in ids]
    )
    act = {"silu": silu, "gelu_pytorch_tanh": gelu}[config.hidden_act]
    scale = config.attention_multiplier or 1 / math.sqrt(width)

    def norm_in_layer(where, role, rows):
        if config.norm_placement not in (where, "both"):
            return rows
        return normed(f"model.layers.{layer}.{called(config, role)}", rows)

    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        sliding = config.layer_types is None or config.layer_types[layer] == "sliding_attention"
        window = config.sliding_window if sliding else None
        y = norm_in_layer("before", "input_layernorm", x)
        q = linear(f"{name}.self_attn.q_proj", y)
        k = linear(f"{name}.self_attn.k_proj", y)
        v = linear(f"{name}.self_attn.v_proj", y)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if config.qk_norm != "none" and not config.qk_norm_after_rope:
            q = normed_heads(f"{name}.{called(config, 'self_attn.q_norm')}", q, heads)
            k = normed_heads(f"{name}.{called(config, 'self_attn.k_norm')}", k, kv_heads)
        q = turned(f"{name}.self_attn.q_rope", q, heads)
        if config.layer_rope_theta is None or config.layer_rope_theta[layer]:
            q = sites[f"{name}.self_attn.q_rope"] = warmed(q)
        k = turned(f"{name}.self_attn.k_rope", k, kv_heads)
        if config.qk_norm_after_rope:
            q = normed_heads(f"{name}.{called(config, 'self_attn.q_norm')}", q, heads)
            k = normed_heads(f"{name}.{called(config, 'self_attn.k_norm')}", k, kv_heads)
        v = v.reshape(count, config.num_key_value_heads, width)
        rule = np.tri(count) if mask is None else mask
        seen = [
            [t for t in range(count) if rule[s, t] and (window is None or s - t < window)]
            for s in range(count)
        ]
        change = (changes or {}).get(layer)
        cap = config.attn_logit_softcapping
        sinks = weights[f"{name}.self_attn.sinks"] if config.attention_sinks else None
        heads = attention(q[None], k[None], v[None], [seen], scale, cap, change, sinks)[0]
        sites[f"{name}.self_attn.attention"] = heads
        y = linear(f"{name}.self_attn.o_proj", heads.reshape(count, -1))
        y = norm_in_layer("after", "post_self_attn_layernorm", y)
        x = x + config.residual_multiplier * y
        sites[f"{name}.attention_residual"] = x
        y = norm_in_layer("before", "post_attention_layernorm", x)
        gate, up = linear(f"{name}.mlp.gate_proj", y), linear(f"{name}.mlp.up_proj", y)
        gated = np.array(
            [
                [act(g) * u for g, u in zip(*rows, strict=True)]
                for rows in zip(gate, up, strict=True)
            ]
        )
        sites[f"{name}.mlp.act"] = gated
        y = linear(f"{name}.mlp.down_proj", gated)
        y = norm_in_layer("after", "post_mlp_layernorm", y)
        x = x + config.residual_multiplier * y
        sites[name] = x
    y = normed("model.norm", x)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    sites["lm_head"] = np.array([weights[f"{head}.weight"] @ row for row in y])
    if config.logits_scaling != 1:
        by = config.logits_scaling
        sites["logits"] = sites["lm_head"] * (by if config.model_type == "hyperclovax" else 1 / by)
    if (cap := config.final_logit_softcapping) is not None:
        logits = sites.get("logits", sites["lm_head"])
        sites["logits"] = cap * np.tanh(logits / cap)
    return sites


def logits(weights, config, ids, positions=None, lengths=None):
    sites = forward(weights, config, ids, positions, lengths)
    return sites.get("logits", sites["lm_head"])
