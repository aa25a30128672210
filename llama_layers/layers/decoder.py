"""One decoder layer."""

from __future__ import annotations

from functools import partial

from llama_layers.arrays.types import Array, ArrayT
from llama_layers.config.families import FAMILIES
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.attention import attention, tapped_attention
from llama_layers.layers.group import reduce_partial
from llama_layers.layers.layer_cache import LayerCache
from llama_layers.layers.linear import flat_qkv, linear, merge_heads, split_heads
from llama_layers.layers.mask import Mask
from llama_layers.layers.mlp import mlp
from llama_layers.layers.norm import rms_norm, rms_norms_over_ranks
from llama_layers.layers.rope import apply_rope
from llama_layers.layers.scaling import added
from llama_layers.layers.sites import sites_of_layer
from llama_layers.layers.tap import Tap, TapFunction, asks_for, checked, in_family, inside
from llama_layers.layers.temperature import rotated_query
from llama_layers.layers.weights import AttentionWeights, LayerWeights


def decoder_layer(
    x: ArrayT,
    w: LayerWeights,
    /,
    *,
    config: LlamaConfig,
    rope: tuple[Array, ...] | None,
    mask: Mask | Array | None,
    cache: LayerCache | None = None,
    tap: Tap | None = None,
) -> ArrayT:
    r"""Attend, then transform each token, both added to the residual stream.

    .. math:: h = x + W_o \operatorname{attention}(\operatorname{norm}(x)), \quad
        y = h + \operatorname{mlp}(\operatorname{norm}(h))

    Parameters
    ----------
    x : Array, shape [B, S, hidden_size], a float dtype
        The residual stream.
    w : LayerWeights
        From the same library and device as `x`.
    config : LlamaConfig
        Its ``rms_norm_eps`` and the switches of the block are read.
    rope : tuple of two or three Arrays, or None
        Cosines and sines of the tokens' positions, from `rope_table`, and where the config has a
        ``llama_4_scaling_beta`` the factors from `query_temperature`; None for a layer that has no
        RoPE. Where RoPE differs from layer to layer, ``config.rope_of(layer)`` is that of a layer.
    mask : Array of bool, Mask or None
        Which keys each query may attend to; see `attention`. With None every query attends to
        every key, later ones too: causal attention needs a `Mask`, with a cache as well.
    cache : LayerCache, optional
        Holds the keys and values of earlier tokens, and takes those of the new ones. For layer i
        it is ``LayerCache(cache.extend(S), i)``, with the cache extended once for all layers.
        Afterwards its attribute ``cache`` is the valid `KVCache`, for the next layer.
    tap : callable or mapping of str to callable, optional
        ``tap(name, array) -> array``, called at each site with the name of its module inside the
        layer, ``self_attn.q_proj`` for example. The array that it returns, of the same shape and
        dtype, is used instead of the array. A mapping calls its functions only at the sites that
        their keys name; see `forward`.

    Returns
    -------
    Array, shape and dtype of x
        The residual stream after the layer.

    Raises
    ------
    TypeError
        If `w`, `config`, `rope`, `cache` or `tap` is of another type.
    TypeError, ValueError
        As the functions called here; or if a key of `tap` names no site, or a function returns an
        array of another shape or dtype.

    References
    ----------
    H. Touvron et al., "LLaMA", section 2.2. `arXiv:2302.13971 <https://arxiv.org/abs/2302.13971>`_

    Examples
    --------
    A layer of random weights, with 2 query heads and 1 key and value head of width 4:

    >>> import numpy as np
    >>> from llama_layers import AttentionWeights, KVCache, LayerCache, LayerWeights, LlamaConfig
    >>> from llama_layers import Mask, MLPWeights, QKVWeights, decoder_layer, rope_table
    >>> config = LlamaConfig(
    ...     hidden_size=8,
    ...     intermediate_size=12,
    ...     num_attention_heads=2,
    ...     num_key_value_heads=1,
    ...     num_hidden_layers=1,
    ...     rms_norm_eps=1e-5,
    ...     rope_theta=10000.0,
    ...     max_position_embeddings=16,
    ...     vocab_size=10,
    ... )
    >>> normal = np.random.default_rng(0).standard_normal
    >>> w = LayerWeights(
    ...     np.ones(8),
    ...     AttentionWeights(QKVWeights(normal((16, 8)), 2, 1), normal((8, 8))),
    ...     np.ones(8),
    ...     MLPWeights(normal((12, 8)), normal((12, 8)), normal((8, 12))),
    ... )

    Three tokens at once:

    >>> x, place = normal((1, 3, 8)), np.arange(3)
    >>> rope = rope_table(place, config, like=x)
    >>> whole = decoder_layer(x, w, config=config, rope=rope, mask=Mask(place, place))

    The same one by one, each with the cache that the one before left:

    >>> cache = KVCache.create(config, 1, 3, like=x)
    >>> for i in range(3):
    ...     view = LayerCache(cache.extend(1), 0)
    ...     rope = rope_table(place[i : i + 1], config, like=x)
    ...     mask = Mask(place[i : i + 1], place[: i + 1])
    ...     y = decoder_layer(
    ...         x[:, i : i + 1], w, config=config, rope=rope, mask=mask, cache=view
    ...     )
    ...     cache = view.cache
    >>> np.allclose(y, whole[:, 2:])
    True
    """
    _check(w, config, rope, cache)
    tap = checked(tap, partial(sites_of_layer, config))
    tap = in_family(tap, FAMILIES[config.model_type].modules)
    before, after = config.norms_before, config.norms_after
    eps, offset = config.rms_norm_eps, config.norm_weight_offset

    def norm(name: str, x: Array) -> Array:
        return tap(name, rms_norm(x, getattr(w, name), eps=eps, offset=offset))

    inner = inside(tap, "self_attn")
    by = config.residual_multiplier
    read = norm("input_layernorm", x) if before else x
    y = _self_attention(read, w.self_attn, config, rope, mask, cache, inner)
    x = tap("attention_residual", added(x, norm("post_self_attn_layernorm", y) if after else y, by))

    read = norm("post_attention_layernorm", x) if before else x
    y = mlp(read, w.mlp, hidden_act=config.hidden_act, tap=inside(tap, "mlp"))
    return added(x, norm("post_mlp_layernorm", y) if after else y, by)


def _self_attention(
    x: Array,
    w: AttentionWeights,
    config: LlamaConfig,
    rope: tuple[Array, ...] | None,
    mask: Mask | Array | None,
    cache: LayerCache | None,
    tap: TapFunction,
) -> Array:
    """Project normalised tokens to queries, keys and values, attend, and project out."""
    q, k, v = flat_qkv(x, w.qkv)
    q = split_heads(tap("q_proj", q), w.qkv.head_dim)
    k = split_heads(tap("k_proj", k), w.qkv.head_dim)
    v = split_heads(tap("v_proj", v), w.qkv.head_dim)
    if config.qk_norm_after_rope:
        q, k = _normed(*_rotated(q, k, config, rope, tap), w, config, tap)
    else:
        q, k = _rotated(*_normed(q, k, w, config, tap), config, rope, tap)
    if cache is not None:
        k, v = cache.append(k, v)
    scale, softcap = config.attention_scale, config.attn_logit_softcapping
    if asks_for(tap, "scores", "probabilities"):
        heads = tapped_attention(
            q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=w.sinks, tap=tap
        )
    else:
        heads = attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=w.sinks)
    heads = tap("attention", heads)
    y = linear(merge_heads(heads), w.o_proj, w.o_bias)
    return tap("o_proj", reduce_partial(y, w.group))


def _rotated(
    q: Array, k: Array, config: LlamaConfig, rope: tuple[Array, ...] | None, tap: TapFunction
) -> tuple[Array, Array]:
    """Queries and keys after RoPE, if the layer has it."""
    if rope is not None:
        part = config.rotary_dim if config.partial_rotary_factor < 1 else None
        q = rotated_query(q, rope, part)
        k = apply_rope(k, *rope[:2], rotary_dim=part)
    return tap("q_rope", q), tap("k_rope", k)


def _normed(
    q: Array, k: Array, w: AttentionWeights, config: LlamaConfig, tap: TapFunction
) -> tuple[Array, Array]:
    """Queries and keys after their norms, if there are any."""
    if config.qk_norm == "none":
        return q, k
    options = {"eps": config.rms_norm_eps, "offset": config.norm_weight_offset}
    whole, weights = config.qk_norm == "full", (w.q_norm, w.k_norm)
    rows = [merge_heads(x) if whole else x for x in (q, k)]
    if whole and w.group is not None:
        normed = rms_norms_over_ranks(rows, weights, w.group, **options)
    else:
        normed = [rms_norm(x, weight, **options) for x, weight in zip(rows, weights, strict=True)]
    normed = [tap(name, y) for name, y in zip(("q_norm", "k_norm"), normed, strict=True)]
    q, k = (split_heads(y, w.qkv.head_dim) if whole else y for y in normed)
    return q, k


def _check(
    w: LayerWeights, config: LlamaConfig, rope: tuple[Array, ...] | None, cache: LayerCache | None
) -> None:
    for name, value, kind in (("w", w, LayerWeights), ("config", config, LlamaConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    if not isinstance(cache, LayerCache | None):
        raise TypeError(
            f"cache: expected LayerCache(cache.extend(S), layer) of a KVCache, "
            f"got {type(cache).__name__}"
        )
    found = len(rope) if isinstance(rope, tuple | list) else type(rope).__name__
    if rope is None and None in config.rope_kinds:
        return
    if config.llama_4_scaling_beta and found != 3:
        raise TypeError(
            f"rope: expected cosines and sines from rope_table and factors from "
            f"query_temperature, got {found}"
        )
    if not config.llama_4_scaling_beta and found != 2:
        raise TypeError(
            f"rope: expected two arrays, cosines and sines from rope_table, got {found}"
        )
