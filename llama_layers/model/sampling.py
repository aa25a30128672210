"""From logits to a token."""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.checks import check_count, check_finite, check_number
from llama_layers.arrays.dtypes import float_format
from llama_layers.arrays.namespaces import device, namespace
from llama_layers.arrays.transfer import from_numpy, to_numpy
from llama_layers.arrays.types import Array, Number
from llama_layers.errors import shown


def sample(
    logits: Array,
    /,
    *,
    temperature: Number = 1.0,
    top_k: SupportsIndex | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    rng: np.random.Generator | int | None = None,
) -> Array:
    r"""Draw a token for each sequence.

    .. math:: P(i) \propto e^{\ell_i / T}

    over the tokens that every filter keeps, in this order: `top_k`, `top_p` of what that leaves,
    `min_p` of what that leaves.

    Parameters
    ----------
    logits : Array, shape [B, vocab_size], a float dtype
        The logits of the last token of each sequence.
    temperature : float
        T above; 0 is greedy: the first of the largest logits, and nothing else is read.
    top_k : int, optional
        Keep the k largest logits, and those equal to the smallest of them.
    top_p : float, optional
        Keep the fewest tokens, the most likely first, whose probabilities sum to `top_p` or more.
    min_p : float, optional
        Keep the tokens that are at least `min_p` times as likely as the most likely one.
    rng : numpy.random.Generator, int or None
        The only source of randomness (SPEC 7): a seed repeats a draw, None never does.

    Returns
    -------
    Array, shape [B], int64 (int32 on libraries without it)
        Token ids, of the library and device of `logits`.

    Raises
    ------
    TypeError
        If `logits` is not an array of floats, `temperature`, `top_p` or `min_p` is not a number, or
        `rng` is not a source of randomness.
    ValueError
        If its shape is another, it contains NaN, an option is out of range, or, unless greedy, the
        largest logit of a row is infinite.

    References
    ----------
    Top-p: A. Holtzman et al., `arXiv:1904.09751 <https://arxiv.org/abs/1904.09751>`_. Min-p:
    M. Nguyen et al., `arXiv:2407.01082 <https://arxiv.org/abs/2407.01082>`_

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import sample
    >>> sample(np.array([[0.0, 3.0, 1.0]]), temperature=0)
    array([1])
    >>> sample(np.array([[0.0, 3.0, 1.0]]), top_k=1, rng=0)
    array([1])
    """
    xp = namespace(logits=logits)
    float_format("logits", logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits: expected shape [B, vocab_size], got {list(logits.shape)}")
    check_options(temperature, top_k, top_p, min_p)
    temperature = float(temperature)
    if bool(xp.any(logits != logits)):
        raise ValueError("logits: expected numbers, got NaN")
    if temperature == 0:
        return xp.argmax(logits, axis=-1)
    weights = _weights(
        _below_largest(logits, temperature),
        None if top_k is None else int(top_k),  # an unsigned one has no negative
        None if top_p is None else float(top_p),
        None if min_p is None else float(min_p),
    )
    cumulative = np.cumsum(weights, axis=-1)
    drawn = random_generator(rng).random((logits.shape[0], 1)) * cumulative[:, -1:]
    # The first token whose cumulative weight exceeds the draw: one of weight 0 never is.
    ids = np.argmax(cumulative > drawn, axis=-1)
    return from_numpy(ids, xp, device(logits))


class Sampling(NamedTuple):
    """The options of `sample`, for many draws from one generator."""

    temperature: Number
    top_k: SupportsIndex | None
    top_p: Number | None
    min_p: Number | None
    rng: np.random.Generator

    def draw(self, logits: Array) -> Array:
        """Draw a token for each sequence."""
        return sample(logits, **self._asdict())


def check_options(
    temperature: Number,
    top_k: SupportsIndex | None,
    top_p: Number | None,
    min_p: Number | None,
) -> None:
    """Raise unless the options of `sample` are numbers in their ranges."""
    check_finite("temperature", temperature, negative=False)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None:
            check_number(name, value)
    if top_k is not None:
        check_count("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, got {shown(top_p)}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p: expected 0 to 1, got {shown(min_p)}")


def random_generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    """The NumPy generator that is `rng`, or that it seeds."""
    try:
        if isinstance(rng, bool):
            raise TypeError
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        expected = "a numpy.random.Generator, an integer, zero or more, or None"
        raise type(error)(f"rng: expected {expected}, got {shown(rng)}") from None


def _below_largest(logits: Array, temperature: float) -> NDArray[np.float64]:
    """The logits minus the largest of their row, over the temperature, in NumPy's float64."""
    wide = to_numpy(logits).astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("logits: expected the largest of each row to be finite, got an infinity")
    with np.errstate(over="ignore"):  # a token infinitely far below the largest
        return (wide - largest) / temperature


def _weights(
    scaled: NDArray[np.float64], top_k: int | None, top_p: float | None, min_p: float | None
) -> NDArray[np.float64]:
    """Weights to which the probabilities of tokens are proportional; 0 where a filter drops one."""
    weights = np.exp(scaled)
    if top_k is not None and top_k < weights.shape[-1]:
        smallest_kept = np.partition(scaled, -top_k, axis=-1)[:, -top_k, None]
        weights = np.where(scaled >= smallest_kept, weights, 0.0)
    if top_p is not None and top_p < 1:
        order = np.argsort(-weights, axis=-1, stable=True)
        descending = np.take_along_axis(weights, order, axis=-1)
        before = np.cumsum(descending, axis=-1) - descending
        enough = before >= top_p * descending.sum(axis=-1, keepdims=True)
        np.put_along_axis(weights, order, np.where(enough, 0.0, descending), axis=-1)
    if min_p is not None:
        weights = np.where(weights >= min_p * weights.max(axis=-1, keepdims=True), weights, 0.0)
    return weights
