"""Text, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.checks import (
    MOST_TOKENS,
    check_count,
    check_finite,
    check_flag,
    is_integer,
)
from llama_layers.arrays.dispatch import portable
from llama_layers.arrays.dtypes import check_integers
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import Array, Namespace, Number
from llama_layers.errors import shown
from llama_layers.layers.cache import KVCache
from llama_layers.layers.group import check_shared
from llama_layers.layers.sites import sites_of_model
from llama_layers.layers.tap import Tap, TapFunction, checked, untouched
from llama_layers.model.forward import forward
from llama_layers.model.llama import Llama, check_model
from llama_layers.model.logits_processor import LogitsProcessor, Processing
from llama_layers.model.logprobs import log_softmax, picked
from llama_layers.model.sampling import Sampling, check_options, random_generator

# Prompt tokens that go through the model at once if the cache is a ring.
CHUNK = 512


class Step(NamedTuple):
    """A token of each sequence, and how likely the model found it."""

    ids: Array
    """Array [B] of integers."""
    logprobs: Array
    """Array [B], in float32 or wider; 0 for padding."""


@overload
def generate(  # numpydoc ignore=GL08
    model: Llama,
    input_ids: Array,
    /,
    *,
    max_new_tokens: SupportsIndex,
    temperature: Number = ...,
    top_k: SupportsIndex | None = ...,
    top_p: Number | None = ...,
    min_p: Number | None = ...,
    repetition_penalty: Number = ...,
    rng: np.random.Generator | int | None = ...,
    eos_token_id: int | tuple[int, ...] | None = ...,
    attention_mask: Array | None = ...,
    cache: KVCache | None = ...,
    tap: Tap | None = ...,
    logits_processor: LogitsProcessor | None = ...,
    return_logprobs: Literal[False] = ...,
) -> Iterator[Array]: ...
@overload
def generate(  # numpydoc ignore=GL08
    model: Llama,
    input_ids: Array,
    /,
    *,
    max_new_tokens: SupportsIndex,
    temperature: Number = ...,
    top_k: SupportsIndex | None = ...,
    top_p: Number | None = ...,
    min_p: Number | None = ...,
    repetition_penalty: Number = ...,
    rng: np.random.Generator | int | None = ...,
    eos_token_id: int | tuple[int, ...] | None = ...,
    attention_mask: Array | None = ...,
    cache: KVCache | None = ...,
    tap: Tap | None = ...,
    logits_processor: LogitsProcessor | None = ...,
    return_logprobs: Literal[True],
) -> Iterator[Step]: ...
def generate(
    model: Llama,
    input_ids: Array,
    /,
    *,
    max_new_tokens: SupportsIndex,
    temperature: Number = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number = 1.0,
    rng: np.random.Generator | int | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    attention_mask: Array | None = None,
    cache: KVCache | None = None,
    tap: Tap | None = None,
    logits_processor: LogitsProcessor | None = None,
    return_logprobs: bool = False,
) -> Iterator[Array] | Iterator[Step]:
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
    tap : callable or mapping of str to callable, optional
        Called in every forward pass, that of the prompt and those of the new tokens; see `forward`.
        The prompt may go through the model in several passes.
    logits_processor : callable, optional
        ``logits_processor(input_ids, logits) -> logits``, as processors of transformers are called:
        with all ids [B, n] so far, the prompt, its padding and the new ones, and the logits
        [B, vocab_size] after `repetition_penalty` and before `temperature`. What it returns, of the
        same shape, dtype and library, is used instead; minus infinity excludes a token.
    return_logprobs : bool, optional
        Whether to return log-probabilities as well.

    Returns
    -------
    iterator of Array, shape [B], an integer dtype
        One array for each step. A sequence ends with the token that ends it. While others go on,
        it is padded: with ``pad_token_id`` of the config, or the first token that ends a sequence
        if there is none. With `return_logprobs` each step is a named tuple ``(ids, logprobs)``,
        both [B]: the log-probabilities of the tokens under the model's own logits, before penalty,
        processor, temperature and filters; 0 for padding.

    Raises
    ------
    TypeError
        If ids or mask come from another library or have a wrong dtype, or an option is not of its
        type.
    ValueError
        If a shape does not fit, an id or an option is out of range, a key of `tap` names no site,
        or a prompt ends in padding: at once, not at the first step. In a step, if
        `logits_processor` returns something else than logits.

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
    processing = None if logits_processor is None else Processing(logits_processor, input_ids)
    return_logprobs = check_flag("return_logprobs", return_logprobs)
    tap = checked(tap, partial(sites_of_model, model.config))
    generator = random_generator(rng)
    ends = _ends(model, eos_token_id)
    if (group := model.weights.group) is not None:  # all ranks draw the same tokens, as many
        options: dict[str, object] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        options |= {"repetition_penalty": repetition_penalty, "eos_token_id": ends}
        check_shared(group, max_new_tokens=max_new_tokens, **options)
        generator = group.broadcast(generator)
    sampling = Sampling(temperature, top_k, top_p, min_p, generator)
    if attention_mask is not None:
        _check_prompts(xp, input_ids, attention_mask)
    used = None if repetition_penalty == 1 else _used(model, input_ids, attention_mask)
    logits, cache = _prefill(model, input_ids, attention_mask, cache, max_new_tokens, tap)
    start = Start(
        model,
        logits,
        cache,
        max_new_tokens,
        sampling,
        repetition_penalty,
        used,
        tap,
        processing,
        return_logprobs,
    )
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
    model: Llama,
    input_ids: Array,
    attention_mask: Array | None,
    cache: KVCache | None,
    more: int,
    tap: TapFunction,
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
            tap=tap,
        )
    return logits, cache


def _advance(
    model: Llama,
    input_ids: Array,
    cache: KVCache,
    attention_mask: Array | None = None,
    *,
    tap: TapFunction,
) -> tuple[Array, KVCache]:
    """The logits [B, vocab_size] after some tokens, and the cache with them."""
    output = forward(
        model, input_ids, cache=cache, attention_mask=attention_mask, last_only=True, tap=tap
    )
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
    tap: TapFunction = untouched
    processor: Processing | None = None
    """Takes the tokens that are given out, too."""
    logprobs: bool = False
    """Whether log-probabilities are asked for."""


def _until_ended(start: Start, ends: tuple[int, ...]) -> Iterator[Any]:
    """Tokens until every sequence has ended, and padding for those that ended before others."""
    xp, config = namespace(logits=start.logits), start.model.config
    candidates = (config.pad_token_id, *ends)  # some published configs say -1 for none
    valid = (i for i in candidates if i is not None and 0 <= i < config.vocab_size)
    padding = next(valid, None)
    ended = np.zeros(start.logits.shape[0], dtype=bool)
    for ids, drawn, logprobs in decode_loop(xp, start):
        if ended.any():
            over = from_numpy(ended, xp, device(ids))
            fill = ids if padding is None else xp.full_like(ids, padding)
            ids = xp.where(over, fill, ids)
            if logprobs is not None:
                logprobs = xp.where(over, xp.zeros_like(logprobs), logprobs)
        if start.processor is not None:
            start.processor.add(ids)
        yield ids if logprobs is None else Step(ids, logprobs)
        ended = ended | np.isin(drawn, ends)
        if ended.all():
            return


@portable
def decode_loop(xp: Namespace, start: Start) -> Iterator[tuple[Array, np.ndarray, Array | None]]:
    """Draw a token for each sequence, feed it back, and so on.

    Gives an array [B] of ids in each step, the same in NumPy, and their log-probabilities if these
    are asked for. Sequences that ended go on.
    """
    model, logits, cache = start.model, start.logits, start.cache
    for left in reversed(range(start.max_new_tokens)):
        own = log_softmax(xp, logits) if start.logprobs else None
        if start.used is not None:
            logits = _penalised(xp, logits, start.used, start.penalty)
        if start.processor is not None:
            logits = start.processor(logits)
        ids = start.sampling.draw(logits)
        drawn = to_numpy(ids)
        if start.used is not None:
            start.used[np.arange(drawn.shape[0]), drawn] = True
        yield ids, drawn, None if own is None else picked(xp, own, ids)
        if left:
            logits, cache = _advance(model, xp.expand_dims(ids, axis=1), cache, tap=start.tap)


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
