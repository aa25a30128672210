"""The forward pass: from token ids to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.namespaces import namespace
from llama_layers.layers.cache import KVCache, changed
from llama_layers.layers.decoder import decoder_layer
from llama_layers.layers.layer_cache import LayerCache
from llama_layers.layers.linear import linear
from llama_layers.layers.mask import Mask
from llama_layers.layers.norm import rms_norm
from llama_layers.layers.rope import rope_table
from llama_layers.layers.tap import Tap, checked, inside
from llama_layers.model.embedding import activations, embed
from llama_layers.model.inputs import (
    check_cache,
    check_last,
    check_positions,
    kept_tokens,
    layer_masks,
    token_positions,
)
from llama_layers.model.llama import Llama, check_model


class Output(NamedTuple):
    """What a forward pass gives."""

    logits: Any
    """Array [B, S, vocab_size], or [B, 1, vocab_size] of the last token only."""
    cache: KVCache | None
    """The valid cache, if one was given."""


def forward(
    model: Llama,
    input_ids: Any,
    /,
    *,
    cache: KVCache | None = None,
    positions: Any | None = None,
    attention_mask: Any | None = None,
    last_only: bool = False,
    tap: Tap | None = None,
) -> Output:
    """Run a model on token ids.

    Parameters
    ----------
    model : Llama
        Its weights decide library and device.
    input_ids : Array, shape [B, S], an integer dtype
        Token ids; after those that the cache has seen, if there is one.
    cache : KVCache, optional
        Keys and values of earlier tokens; the one in the output is valid afterwards.
    positions : Array, shape [S], [1, S] or [B, S], an integer dtype, optional
        For RoPE. By default tokens are counted from the first that is not padding, on from the
        cache.
    attention_mask : Array, shape [B, S], bool or 0 and 1 of an integer dtype, optional
        Which of the ids are tokens and no padding. With a cache also [B, past + S], as Hugging
        Face has it, of which the last S columns are read.
    last_only : bool, optional
        Whether to compute the logits of the last token only, which must be no padding.
    tap : callable, optional
        ``tap(name, array) -> array``, called at each site with the name of its module in Hugging
        Face's model; what it returns, of the same shape and dtype, takes the array's place.

    Returns
    -------
    Output
        ``logits`` in the dtype of the activations: float32 on NumPy (float64 for float64
        weights), that of the embedding elsewhere; and ``cache``.

    Raises
    ------
    TypeError
        If ids, positions or mask are of another library or a wrong dtype, or another argument is
        of another type.
    ValueError
        If a shape does not fit, an id or position is out of range, or the cache is too short;
        the cache is untouched then.

    Notes
    -----
    A sliding window counts the slots of the batch, padding included: pad before the first token
    of a sequence, not inside it. Positions beyond ``max_position_embeddings`` are computed like
    any others, though the model has not seen them in training.

    References
    ----------
    H. Touvron et al., "LLaMA", section 2.2. `arXiv:2302.13971 <https://arxiv.org/abs/2302.13971>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import forward, load
    >>> model = load("smollm2-135m")  # doctest: +SKIP
    >>> forward(model, np.array([[1, 2, 3]])).logits.shape  # doctest: +SKIP
    (1, 3, 49152)
    """
    check_model(model)
    tap = checked(tap)
    if not isinstance(last_only, bool):
        raise TypeError(f"last_only: expected a bool, got {type(last_only).__name__}")
    config, weights = model.config, model.weights
    namespace(weights=weights.embed_tokens, input_ids=input_ids)  # of one library, or a TypeError
    x = embed(input_ids, weights.embed_tokens)
    x = tap("model.embed_tokens", activations(namespace(x=x), x))
    if cache is not None:
        check_cache(x, config, cache)
    keep = kept_tokens(x, attention_mask, 0 if cache is None else cache.length)
    if last_only:
        check_last(x, keep)
    if positions is None:
        positions = token_positions(x, keep, cache)
    check_positions(x, positions)
    rope = rope_table(positions, config, like=x)
    if cache is not None:
        cache = cache.extend(x.shape[1], keep)
    masks = layer_masks(x, config, keep, cache)
    x, cache = decoder_layers(namespace(x=x), x, model, rope, masks, cache, tap)
    if cache is not None:
        cache = changed(cache, room=0)
    if last_only:
        x = x[:, -1:, :]
    x = tap("model.norm", rms_norm(x, weights.norm, eps=config.rms_norm_eps))
    return Output(tap("lm_head", linear(x, weights.lm_head)), cache)


@portable
def decoder_layers(
    xp: Any,
    x: Any,
    model: Llama,
    rope: tuple[Any, Any],
    masks: Mapping[int | None, Mask],
    cache: KVCache | None,
    tap: Tap,
) -> tuple[Any, KVCache | None]:
    """The residual stream after all layers, and the cache with their keys and values."""
    for index, layer in enumerate(model.weights.layers):
        part = None if cache is None else LayerCache(cache, index)
        x = decoder_layer(
            x,
            layer,
            config=model.config,
            rope=rope,
            mask=masks[model.config.window_of(index)],
            cache=part,
            tap=inside(tap, f"model.layers.{index}"),
        )
        x = tap(f"model.layers.{index}", x)
        cache = None if part is None else part.cache
    return x, cache
