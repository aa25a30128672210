"""The forward pass: from token ids to logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from llama_layers.arrays.brief import brief
from llama_layers.arrays.checks import check_flag, check_shape
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import dtype_name
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array, Namespace
from llama_layers.config.families import FAMILIES
from llama_layers.config.rope_layers import RopeKind
from llama_layers.layers.cache import KVCache
from llama_layers.layers.decoder import decoder_layer
from llama_layers.layers.group import check_shared
from llama_layers.layers.layer_cache import LayerCache
from llama_layers.layers.linear import linear
from llama_layers.layers.mask import Mask
from llama_layers.layers.norm import rms_norm
from llama_layers.layers.scaling import multiplied, scaled_logits
from llama_layers.layers.sites import sites_of_model
from llama_layers.layers.tap import Tap, TapFunction, checked, inside, untouched
from llama_layers.model.embedding import activations, embed, embedding_factor
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
    input_ids: Array | None = None,
    /,
    *,
    inputs_embeds: Array | None = None,
    cache: KVCache | None = None,
    positions: Array | None = None,
    attention_mask: Array | None = None,
    mask: Mask | Array | None = None,
    last_only: bool = False,
    tap: Tap | None = None,
) -> Output:
    """Run a model on token ids, or on vectors instead of their embeddings.

    Parameters
    ----------
    model : Llama
        Its weights decide library and device.
    input_ids : Array, shape [B, S], an integer dtype
        Token ids, which follow those that the cache has seen, if there is one.
    inputs_embeds : Array, shape [B, S, hidden_size], the dtype of the activations
        Vectors instead of `input_ids`: soft prompts, images, mixtures of embeddings. As in Hugging
        Face's models, those of Granite are multiplied by ``embedding_multiplier``, as rows of the
        embedding are, and those of Gemma are not.
    cache : KVCache, optional
        Keys and values of earlier tokens; the one in the output is valid afterwards.
    positions : Array, shape [S], [1, S] or [B, S], an integer dtype, optional
        For RoPE. By default tokens are counted from the first that is not padding, on from the
        cache. Positions hide nothing: where they start again for another document, `mask` must
        hide the one before.
    attention_mask : Array, shape [B, S], bool or 0 and 1 of an integer dtype, optional
        Which of the ids are valid tokens, not padding. With a cache also [B, past + S], as in
        Hugging Face's models, of which the last S columns are read.
    mask : Array of bool, shape [S, T], [1, S, T] or [B, S, T], or Mask, optional
        True where a query may attend to a key, instead of every key before it and its own: for
        packed documents, a prefix that sees all of itself, or a tree of drafts. T counts all
        tokens, those in the cache first; it may be `max_len` of the cache, as `jax.jit` needs,
        which does not know how many there are. Padding stays hidden, and so do keys that a layer's
        window no longer reaches; a query that may attend to no key gets zeros. A `Mask` is used as
        it is in every layer, for the keys that ``cache.key_slots()`` lists after the pass.
    last_only : bool, optional
        Whether to compute the logits of the last token only, which must not be padding.
    tap : callable or mapping of str to callable, optional
        ``tap(name, array) -> array``, called at each site with the name of its module in Hugging
        Face's model; what it returns, of the same shape and dtype, is used instead of the array,
        into which it must not write. In a mapping the keys are names of sites
        (`llama_layers.verify.sites` lists them), their names inside a layer, the last words of
        those, or patterns: ``"model.layers.3"``, ``"self_attn.q_proj"``, ``"q_rope"``,
        ``"*.3.mlp.*"``. Two sites are for a mapping only, since they exist only in layers where a
        key names them: "scores", scaled and before the mask, and "probabilities", both
        [B, num_heads, S, T] in float32 or wider.

    Returns
    -------
    Output
        ``logits`` in the dtype of the activations: float32 on NumPy (float64 for float64
        weights), that of the embedding elsewhere; and ``cache``.

    Raises
    ------
    TypeError
        If ids, positions or a mask come from another library or have a wrong dtype, or another
        argument has a wrong type; unless one of `input_ids` and `inputs_embeds` is given.
    ValueError
        If a shape does not fit, an id or position is out of range, the cache is too short, a `Mask`
        contradicts another argument, or a key of `tap` names no site. The cache is unchanged then.

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

    The third head of a layer, switched off:

    >>> def without_head(name, p):
    ...     return p * (np.arange(p.shape[1]) != 2)[:, None, None].astype(p.dtype)
    >>> tap = {"model.layers.5.self_attn.probabilities": without_head}
    >>> output = forward(model, np.array([[1, 2, 3]]), tap=tap)  # doctest: +SKIP
    """
    check_model(model)
    last_only = check_flag("last_only", last_only)
    tap = checked(tap, partial(sites_of_model, model.config))
    x, cache = final_states(
        model,
        input_ids,
        inputs_embeds,
        cache=cache,
        positions=positions,
        attention_mask=attention_mask,
        mask=mask,
        last_only=last_only,
        tap=tap,
    )
    logits = tap("lm_head", head(model, x))
    if model.config.changes_logits:
        logits = tap("logits", scaled_logits(logits, model.config))
    return Output(logits, cache)


def final_states(
    model: Llama,
    input_ids: Array | None = None,
    inputs_embeds: Array | None = None,
    *,
    cache: KVCache | None = None,
    positions: Array | None = None,
    attention_mask: Array | None = None,
    mask: Mask | Array | None = None,
    last_only: bool = False,
    tap: TapFunction = untouched,
) -> tuple[Array, KVCache | None]:
    """What `forward` gives to the head: the states [B, S or 1, hidden_size] after the last norm."""
    xp, x = _embedded(model, input_ids, inputs_embeds)
    check_shared(
        model.weights.group,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        positions=positions,
        attention_mask=attention_mask,
        mask=mask,
        last_only=last_only,
        cache=cache.length if isinstance(cache, KVCache) else None,
    )
    x = tap("model.embed_tokens", x)
    inputs = Inputs.of(
        x, model.config, cache, positions, attention_mask, mask=mask, last_only=last_only
    )
    x, cache = decoder_layers(xp, x, model, inputs.ropes, inputs.masks, inputs.cache, tap)
    if last_only:
        x = x[:, -1:, :]
    eps, offset = model.config.rms_norm_eps, model.config.norm_weight_offset
    x = tap("model.norm", rms_norm(x, model.weights.norm, eps=eps, offset=offset))
    return x, None if cache is None else cache.without_room()


def head(model: Llama, x: Array) -> Array:
    """The products [..., vocab_size] of final states with the head's matrix."""
    return linear(x, model.weights.lm_head)


def logits_of(model: Llama, x: Array) -> Array:
    """The logits [..., vocab_size] of final states."""
    y = head(model, x)
    return scaled_logits(y, model.config) if model.config.changes_logits else y


def _embedded(
    model: Llama, input_ids: Array | None, inputs_embeds: Array | None
) -> tuple[Namespace, Array]:
    """The first hidden states, and their library."""
    table = model.weights.embed_tokens
    if input_ids is not None:
        if inputs_embeds is not None:
            raise TypeError("inputs_embeds: expected None together with input_ids, got both")
        xp = namespace(weights=table, input_ids=input_ids)
        x = activations(xp, embed(input_ids, table))
        return xp, multiplied(x, embedding_factor(model.config, table))
    if inputs_embeds is None:
        raise TypeError("input_ids: expected token ids, or inputs_embeds, got neither")
    xp = namespace(weights=table, inputs_embeds=inputs_embeds)
    check_shape("inputs_embeds", inputs_embeds, "B", "S", model.config.hidden_size)
    found, expected = map(dtype_name, (inputs_embeds.dtype, model.activations_like().dtype))
    if found != expected:
        raise TypeError(
            f"inputs_embeds: expected the dtype of the activations, {expected}, got {found}"
        )
    x = activations(xp, inputs_embeds)
    if not FAMILIES[model.config.model_type].multiplies_inputs:
        return xp, x
    return xp, multiplied(x, embedding_factor(model.config, table))


@portable
def decoder_layers(
    xp: Namespace,
    x: Array,
    model: Llama,
    ropes: Mapping[RopeKind | None, tuple[Array, ...] | None],
    masks: Mapping[int | None, Mask | Array],
    cache: KVCache | None,
    tap: TapFunction,
) -> tuple[Array, KVCache | None]:
    """The residual stream after all layers, and the cache with their keys and values."""
    config = model.config
    for index, layer in enumerate(model.weights.layers):
        name, mask = f"model.layers.{index}", masks[config.window_of(index)]
        rope = ropes[config.rope_kinds[index]]
        view = None if cache is None else LayerCache(cache, index)
        x = decoder_layer(
            x, layer, config=config, rope=rope, mask=mask, cache=view, tap=inside(tap, name)
        )
        x = tap(name, x)
        cache = None if view is None else view.cache
    return x, cache
