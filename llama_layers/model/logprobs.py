"""How likely a model finds tokens."""

from __future__ import annotations

from llama_layers.arrays.dtypes import accumulate_format, dtype_of, float_format
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.tracing import known_false
from llama_layers.arrays.types import Array, Namespace
from llama_layers.model.forward import final_states, logits_of
from llama_layers.model.llama import Llama, check_model

# Logits held at a time: 64 MiB in float32.
LOGITS = 1 << 24


def logprobs(model: Llama, input_ids: Array, /, *, attention_mask: Array | None = None) -> Array:
    r"""Give the log-probability of each token after those before it.

    .. math:: \log P(t_s \mid t_0, \dots, t_{s-1}) =
        \ell_{t_s} - m - \log \sum_i e^{\ell_i - m}, \quad m = \max_i \ell_i

    with the logits that follow token s - 1. Logits exist for a block of tokens at a time.

    Parameters
    ----------
    model : Llama
        The model.
    input_ids : Array, shape [B, S], an integer dtype
        Token ids, at least one of each sequence.
    attention_mask : Array, shape [B, S], bool or 0 and 1 of an integer dtype, optional
        Which of the ids are valid tokens, not padding, which may stand before or after them.

    Returns
    -------
    Array, shape [B, S - 1], float32 (float64 for float64 activations)
        The log-probabilities of all tokens but the first. Padding has 0, and so has the first
        token after padding.

    Raises
    ------
    TypeError, ValueError
        As `forward`; or if there is no token, or padding between tokens.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import load, logprobs
    >>> model = load("smollm2-135m")  # doctest: +SKIP
    >>> ids = np.array([model.tokenizer.encode("Paris is in France.")])  # doctest: +SKIP
    >>> perplexity = np.exp(-logprobs(model, ids).mean())  # doctest: +SKIP
    """
    check_model(model)
    x, _ = final_states(model, input_ids, attention_mask=attention_mask)
    xp = namespace(x=x)
    batch, count = input_ids.shape
    if not count:
        raise ValueError("input_ids: expected at least one token in each sequence, got none")
    keep = None if attention_mask is None else _predicted(xp, attention_mask)
    step = max(1, LOGITS // max(1, batch * model.config.vocab_size))
    parts = []
    for start in range(0, max(1, count - 1), step):
        stop = min(start + step, count - 1)
        found = log_softmax(xp, logits_of(model, x[:, start:stop, :]))
        parts.append(picked(xp, found, input_ids[:, start + 1 : stop + 1]))
    found = parts[0] if len(parts) == 1 else xp.concat(parts, axis=1)
    return found if keep is None else xp.where(keep, found, xp.zeros_like(found))


def log_softmax(xp: Namespace, logits: Array) -> Array:
    """The log-probabilities of all tokens [..., V], in the format of sums."""
    wide = dtype_of(xp, accumulate_format(float_format("logits", logits)).name)
    logits = xp.astype(logits, wide, copy=False)
    below = logits - xp.max(logits, axis=-1, keepdims=True)
    return below - xp.log(xp.sum(xp.exp(below), axis=-1, keepdims=True))


def picked(xp: Namespace, array: Array, ids: Array) -> Array:
    """The elements of array [..., V] that the ids [...] count."""
    size = array.shape[-1]
    flat = xp.reshape(array, (-1, size))
    places = xp.arange(flat.shape[0], device=device(array)) * size
    places = places + xp.reshape(xp.astype(ids, places.dtype), (-1,))
    return xp.reshape(xp.take(xp.reshape(flat, (-1,)), places, axis=0), ids.shape)


def _predicted(xp: Namespace, attention_mask: Array) -> Array:
    """Which tokens but the first [B, S - 1] come after a valid one, and are valid."""
    valid = attention_mask != 0
    before, after = valid[:, :-1], valid[:, 1:]
    starts = xp.astype(after & ~before, xp.int32)
    runs = xp.sum(starts, axis=1, dtype=xp.int32) + xp.astype(valid[:, 0], xp.int32)
    if known_false(xp.all(runs <= 1)):
        raise ValueError(
            "attention_mask: expected padding before or after the tokens of a sequence, not between"
        )
    return before & after
