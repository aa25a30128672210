"""One decoder layer."""

from __future__ import annotations

from functools import partial

from llama_layers.arrays.types import Array, ArrayT
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.attention import attention, tapped_attention
from llama_layers.layers.group import reduce_partial
from llama_layers.layers.layer_cache import LayerCache
from llama_layers.layers.linear import flat_qkv, linear, merge_heads, split_heads
from llama_layers.layers.mask import Mask
from llama_layers.layers.mlp import mlp
from llama_layers.layers.norm import rms_norm
from llama_layers.layers.rope import apply_rope
from llama_layers.layers.sites import sites_of_layer
from llama_layers.layers.tap import Tap, TapFunction, asks_for, checked, inside
from llama_layers.layers.weights import AttentionWeights, LayerWeights


def decoder_layer(
    x: ArrayT,
    w: LayerWeights,
    /,
    *,
    config: LlamaConfig,
    rope: tuple[Array, Array],
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
    rope : tuple of two Arrays
        Cosines and sines of the tokens' positions, from `rope_table`.
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
    eps = config.rms_norm_eps

    normed = tap("input_layernorm", rms_norm(x, w.input_layernorm, eps=eps))
    inner = inside(tap, "self_attn")
    attended = _self_attention(normed, w.self_attn, config, rope, mask, cache, inner)
    x = tap("attention_residual", x + attended)

    normed = tap("post_attention_layernorm", rms_norm(x, w.post_attention_layernorm, eps=eps))
    return x + mlp(normed, w.mlp, tap=inside(tap, "mlp"))


def _self_attention(
    x: Array,
    w: AttentionWeights,
    config: LlamaConfig,
    rope: tuple[Array, Array],
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
        q, k = _normed(*_rotated(q, k, rope, tap), w, config, tap)
    else:
        q, k = _rotated(*_normed(q, k, w, config, tap), rope, tap)
    if cache is not None:
        k, v = cache.append(k, v)
    if asks_for(tap, "scores", "probabilities"):
        heads = tapped_attention(q, k, v, mask=mask, tap=tap)
    else:
        heads = attention(q, k, v, mask=mask)
    heads = tap("attention", heads)
    y = linear(merge_heads(heads), w.o_proj, w.o_bias)
    return tap("o_proj", reduce_partial(y, w.group))


def _rotated(
    q: Array, k: Array, rope: tuple[Array, Array], tap: TapFunction
) -> tuple[Array, Array]:
    """Queries and keys after RoPE."""
    return tap("q_rope", apply_rope(q, *rope)), tap("k_rope", apply_rope(k, *rope))


def _normed(
    q: Array, k: Array, w: AttentionWeights, config: LlamaConfig, tap: TapFunction
) -> tuple[Array, Array]:
    """Queries and keys after their norms, if there are any."""
    if config.qk_norm == "none":
        return q, k
    normed = []
    for name, x, weight in (("q_norm", q, w.q_norm), ("k_norm", k, w.k_norm)):
        whole = config.qk_norm == "full"
        rows = merge_heads(x) if whole else x
        y = tap(name, rms_norm(rows, weight, eps=config.rms_norm_eps))
        normed.append(split_heads(y, w.qkv.head_dim) if whole else y)
    return normed[0], normed[1]


def _check(
    w: LayerWeights, config: LlamaConfig, rope: tuple[Array, Array], cache: LayerCache | None
) -> None:
    for name, value, kind in (("w", w, LayerWeights), ("config", config, LlamaConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    pair = isinstance(rope, tuple | list)
    if not pair or len(rope) != 2:
        raise TypeError(
            f"rope: expected two arrays, cosines and sines from rope_table, "
            f"got {len(rope) if pair else type(rope).__name__}"
        )
    if not isinstance(cache, LayerCache | None):
        raise TypeError(
            f"cache: expected LayerCache(cache.extend(S), layer) of a KVCache, "
            f"got {type(cache).__name__}"
        )
