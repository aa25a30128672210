"""The forward pass: from token ids to logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llama_layers.arrays.brief import brief
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, Namespace
from llama_layers.layers.cache import KVCache, LayerCache
from llama_layers.layers.decoder import decoder_layer
from llama_layers.layers.linear import linear
from llama_layers.layers.mask import Mask
from llama_layers.layers.norm import rms_norm
from llama_layers.layers.tap import Tap, checked, inside
from llama_layers.model.embedding import activations, embed
from llama_layers.model.inputs import Inputs
from llama_layers.model.llama import Llama, check_model


class Output(NamedTuple):
    """The result of a forward pass."""

    logits: Array
    """Array [B, S, vocab_size], or [B, 1, vocab_size] of the last token only."""
    cache: KVCache | None
    """The valid cache, if one was given."""

    def __repr__(self) -> str:
        return brief(self)


def forward(
    model: Llama,
    input_ids: Array,
    /,
    *,
    cache: KVCache | None = None,
    positions: Array | None = None,
    attention_mask: Array | None = None,
    last_only: bool = False,
    tap: Tap | None = None,
) -> Output:
    """Run a model on token ids.

    Parameters
    ----------
    model : Llama
        Its weights decide library and device.
    input_ids : Array, shape [B, S], an integer dtype
        Token ids, which follow those that the cache has seen, if there is one.
    cache : KVCache, optional
        Keys and values of earlier tokens; the one in the output is valid afterwards.
    positions : Array, shape [S], [1, S] or [B, S], an integer dtype, optional
        For RoPE. By default tokens are counted from the first that is not padding, on from the
        cache.
    attention_mask : Array, shape [B, S], bool or 0 and 1 of an integer dtype, optional
        Which of the ids are valid tokens, not padding. With a cache also [B, past + S], as in
        Hugging Face's models, of which the last S columns are read.
    last_only : bool, optional
        Whether to compute the logits of the last token only, which must not be padding.
    tap : callable, optional
        ``tap(name, array) -> array``, called at each site with the name of its module in Hugging
        Face's model; what it returns, of the same shape and dtype, is used instead of the array.

    Returns
    -------
    Output
        ``logits`` in the dtype of the activations: float32 on NumPy (float64 for float64
        weights), that of the embedding elsewhere; and ``cache``.

    Raises
    ------
    TypeError
        If ids, positions or mask come from another library or have a wrong dtype, or another
        argument has a wrong type.
    ValueError
        If a shape does not fit, an id or position is out of range, or the cache is too short.
        The cache is unchanged then.

    Notes
    -----
    A sliding window counts the slots of the batch, padding included: pad before the first token
    of a sequence, not inside it. Positions beyond ``max_position_embeddings`` are computed like
    any others, although the model has not seen them in training.

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
    if not isinstance(last_only, bool):
        raise TypeError(f"last_only: expected a bool, got {type(last_only).__name__}")
    config, weights, tap = model.config, model.weights, checked(tap)
    xp = namespace(weights=weights.embed_tokens, input_ids=input_ids)

    x = activations(xp, embed(input_ids, weights.embed_tokens))
    x = tap("model.embed_tokens", x)
    inputs = Inputs.of(x, config, cache, positions, attention_mask, last_only=last_only)

    x, cache = decoder_layers(xp, x, model, inputs.rope, inputs.masks, inputs.cache, tap)
    if last_only:
        x = x[:, -1:, :]

    x = tap("model.norm", rms_norm(x, weights.norm, eps=config.rms_norm_eps))
    logits = tap("lm_head", linear(x, weights.lm_head))
    return Output(logits, None if cache is None else cache.without_room())


@portable
def decoder_layers(
    xp: Namespace,
    x: Array,
    model: Llama,
    rope: tuple[Array, Array],
    masks: Mapping[int | None, Mask],
    cache: KVCache | None,
    tap: Tap,
) -> tuple[Array, KVCache | None]:
    """The residual stream after all layers, and the cache with their keys and values."""
    config = model.config
    for index, layer in enumerate(model.weights.layers):
        name, mask = f"model.layers.{index}", masks[config.window_of(index)]
        view = None if cache is None else LayerCache(cache, index)
        x = decoder_layer(
            x, layer, config=config, rope=rope, mask=mask, cache=view, tap=inside(tap, name)
        )
        x = tap(name, x)
        cache = None if view is None else view.cache
    return x, cache
