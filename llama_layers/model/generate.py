"""Text, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.checks import MOST_TOKENS, check_count, check_finite, is_integer
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import check_integers
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import Array, Namespace
from llama_layers.errors import shown
from llama_layers.layers.cache import KVCache
from llama_layers.model.forward import forward
from llama_layers.model.llama import Llama, check_model
from llama_layers.model.sampling import Sampling, check_options, random_generator

# Prompt tokens that go through the model at once if the cache is a ring.
CHUNK = 512


def generate(
    model: Llama,
    input_ids: Array,
    /,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    rng: np.random.Generator | int | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    attention_mask: Array | None = None,
    cache: KVCache | None = None,
) -> Iterator[Array]:
    """Continue a batch of prompts.

    Parameters
    ----------
    model : Llama
        The model.
    input_ids : Array, shape [B, S], an integer dtype
        The prompts; padded before their first token, if their lengths differ.
    max_new_tokens : int
        How many tokens to add at most.
    temperature, top_k, top_p, min_p : as for `sample`
        How a token is drawn; greedy by default.
    repetition_penalty : float, optional
        Divides the positive logits, and multiplies the negative ones, of tokens that are in the
        prompt or were added to it; tokens that only the cache has seen are not known.
    rng : numpy.random.Generator, int or None
        The only source of randomness (SPEC 7).
    eos_token_id : int or tuple of int, optional
        Tokens that end a sequence; none if it is empty. By default those of the model's
        ``generation_config``, or of its config where that names none.
    attention_mask : Array, shape [B, S], bool or 0 and 1 of an integer dtype, optional
        Which of the ids are valid tokens, not padding.
    cache : KVCache, optional
        Tokens that come before the prompt, and room for the rest. It is used up: the cache after
        the new tokens is not returned, so a conversation continues with `forward`, or from all of
        its text.

    Returns
    -------
    iterator of Array, shape [B], an integer dtype
        One array for each step. A sequence ends with the token that ends it. While others go on,
        it is padded: with ``pad_token_id`` of the config, or the first token that ends a sequence
        if there is none.

    Raises
    ------
    TypeError
        If ids or mask come from another library or have a wrong dtype, or an option is not a
        number.
    ValueError
        If a shape does not fit, an id or an option is out of range, or a prompt ends in padding;
        at once, not at the first step.

    References
    ----------
    Repetition penalty: N. Keskar et al., "CTRL", section 4.1.
    `arXiv:1909.05858 <https://arxiv.org/abs/1909.05858>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import generate, load
    >>> model = load("smollm2-135m")  # doctest: +SKIP
    >>> ids = np.array([model.tokenizer.encode("The capital of France is")])  # doctest: +SKIP
    >>> new = [int(step[0]) for step in generate(model, ids, max_new_tokens=2)]  # doctest: +SKIP
    >>> model.tokenizer.decode(new)  # doctest: +SKIP
    ' Paris.'
    """
    check_model(model)
    xp = namespace(input_ids=input_ids, attention_mask=attention_mask)
    check_integers("input_ids", input_ids)
    if input_ids.ndim != 2 or not input_ids.shape[1]:
        raise ValueError(
            f"input_ids: expected shape [B, S] with at least one token, got {list(input_ids.shape)}"
        )
    max_new_tokens = check_count("max_new_tokens", max_new_tokens, MOST_TOKENS)
    repetition_penalty = check_finite("repetition_penalty", repetition_penalty)
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty: expected more than 0, got {repetition_penalty}")
    check_options(temperature, top_k, top_p, min_p)
    sampling = Sampling(temperature, top_k, top_p, min_p, random_generator(rng))
    ends = _ends(model, eos_token_id)
    if attention_mask is not None:
        _check_prompts(xp, input_ids, attention_mask)
    used = None if repetition_penalty == 1 else _used(model, input_ids, attention_mask)
    logits, cache = _prefill(model, input_ids, attention_mask, cache, max_new_tokens)
    start = Start(model, logits, cache, max_new_tokens, sampling, repetition_penalty, used)
    return _until_ended(start, ends)


def _check_prompts(xp: Namespace, input_ids: Array, attention_mask: Array) -> None:
    if tuple(attention_mask.shape) != tuple(input_ids.shape):
        raise ValueError(
            f"attention_mask: expected shape {list(input_ids.shape)} of input_ids, "
            f"got {list(attention_mask.shape)}"
        )
    if not bool(xp.all(attention_mask[:, -1] != 0)):
        raise ValueError("attention_mask: expected prompts padded before their first token")


def _ends(model: Llama, eos_token_id: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The tokens that end a sequence."""
    given = eos_token_id
    if given is None:
        given = model.generation_config.get("eos_token_id")
    if given is None:
        given = model.config.eos_token_id
    ends = tuple(given) if isinstance(given, tuple | list) else () if given is None else (given,)
    for end in ends:
        if not is_integer(end) or (end < 0 and eos_token_id is not None):
            raise ValueError(f"eos_token_id: expected token ids, zero or more, got {shown(end)}")
    return ends


def _prefill(
    model: Llama, input_ids: Array, attention_mask: Array | None, cache: KVCache | None, more: int
) -> tuple[Array, KVCache]:
    """The logits after the prompts, and the cache that holds them."""
    batch, count = input_ids.shape
    config = model.config
    chunk = count
    if cache is None:
        windows = {config.window_of(layer) for layer in range(config.num_hidden_layers)}
        rolling = None if None in windows else CHUNK
        cache = KVCache.create(model, batch, count + more, rolling=rolling)
    elif not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    elif cache.length + count + more > cache.max_len:
        raise ValueError(
            f"cache: expected room for {cache.length + count + more} tokens, got max_len = "
            f"{cache.max_len}"
        )
    if cache.window is not None:
        chunk = cache.most_at_once()
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        logits, cache = _advance(
            model,
            input_ids[:, part],
            cache,
            None if attention_mask is None else attention_mask[:, part],
        )
    return logits, cache


def _advance(
    model: Llama, input_ids: Array, cache: KVCache, attention_mask: Array | None = None
) -> tuple[Array, KVCache]:
    """The logits [B, vocab_size] after some tokens, and the cache with them."""
    output = forward(model, input_ids, cache=cache, attention_mask=attention_mask, last_only=True)
    assert output.cache is not None  # since one was given
    return output.logits[:, 0, :], output.cache


class Start(NamedTuple):
    """The state after the prompts, from which tokens are drawn."""

    model: Llama
    logits: Array
    """Array [B, vocab_size], after the prompts."""
    cache: KVCache
    """Holds the prompts, and has room for the tokens to come."""
    max_new_tokens: int
    """How many tokens to draw for each sequence."""
    sampling: Sampling
    penalty: float = 1.0
    used: NDArray[np.bool_] | None = None
    """Which tokens [B, vocab_size] are penalised; None if none are. Drawn ones are added to it."""


def _until_ended(start: Start, ends: tuple[int, ...]) -> Iterator[Array]:
    """Tokens until every sequence has ended, and padding for those that ended before others."""
    xp, config = namespace(logits=start.logits), start.model.config
    candidates = (config.pad_token_id, *ends)  # some published configs say -1 for none
    valid = (i for i in candidates if i is not None and 0 <= i < config.vocab_size)
    padding = next(valid, None)
    ended = np.zeros(start.logits.shape[0], dtype=bool)
    for ids, drawn in decode_loop(xp, start):
        if ended.any():
            fill = ids if padding is None else xp.full_like(ids, padding)
            ids = xp.where(from_numpy(ended, xp, device(ids)), fill, ids)
        yield ids
        ended = ended | np.isin(drawn, ends)
        if ended.all():
            return


@portable
def decode_loop(xp: Namespace, start: Start) -> Iterator[tuple[Array, np.ndarray]]:
    """Draw a token for each sequence, feed it back, and so on.

    Gives an array [B] of ids in each step, and the same in NumPy. Sequences that ended go on.
    """
    model, logits, cache = start.model, start.logits, start.cache
    for left in reversed(range(start.max_new_tokens)):
        if start.used is not None:
            logits = _penalised(xp, logits, start.used, start.penalty)
        ids = start.sampling.draw(logits)
        drawn = to_numpy(ids)
        if start.used is not None:
            start.used[np.arange(drawn.shape[0]), drawn] = True
        yield ids, drawn
        if left:
            logits, cache = _advance(model, xp.expand_dims(ids, axis=1), cache)


def _used(model: Llama, input_ids: Array, attention_mask: Array | None) -> NDArray[np.bool_]:
    """Which tokens of the vocabulary each prompt contains, [B, vocab_size]."""
    ids = to_numpy(input_ids)
    used = np.zeros((ids.shape[0], model.config.vocab_size), dtype=bool)
    valid = np.ones(ids.shape) if attention_mask is None else to_numpy(attention_mask)
    for row, (tokens, mask) in enumerate(zip(ids, valid, strict=True)):
        used[row, tokens[mask != 0]] = True
    return used


def _penalised(xp: Namespace, logits: Array, used: NDArray[np.bool_], penalty: float) -> Array:
    lowered = xp.where(logits < 0, logits * penalty, logits / penalty)
    return xp.where(from_numpy(used, xp, device(logits)), lowered, logits)
