"""Mistakes in which tokens attention sees, and in what is scaled and grouped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.hypotheses.hypothesis import (
    Change,
    Hypothesis,
    Only,
    with_fields,
)
from llama_layers.verify.operations import (
    Attention,
    Probabilities,
    Scores,
    Softmax,
    WeightedSum,
)

Bools = NDArray[np.bool_]
_Masked = Attention | Probabilities | Softmax
_Scaled = Attention | Probabilities | Scores


def _seen(failing: FailingSite, causal: int | None, window: int | None, padding: bool) -> Bools:
    """Which keys are seen: up to so many tokens ahead, within a window, padding or not."""
    queries, keys = np.indices((failing.recorded.count,) * 2)
    seen = np.ones(queries.shape, bool) if causal is None else keys <= queries + causal
    if window is not None:
        seen &= keys > queries - window
    keep = failing.recorded.keep
    return seen[None] if keep is None or padding else seen & keep[:, None, :]


def _window(failing: FailingSite) -> int | None:
    assert failing.site.layer is not None  # attention is inside a layer
    return failing.recorded.config.window_of(failing.site.layer)


def masked(operation: Any, mask: Any) -> Computable:
    """The operation with another mask; rows that see nothing may be anything, then."""
    changed: Computable = with_fields(operation, mask=mask)
    empty = ~mask.any(axis=-1) if mask.dtype == bool else np.zeros(1, bool)
    if not empty.any():
        return changed
    if isinstance(operation, Attention):
        return Only(changed, ~empty[:, :, None, None])
    return Only(changed, ~empty[:, None, :, None])


def _with(
    causal: int | None = 0, padding: bool = False, windowed: bool = True
) -> Callable[[Any, FailingSite], Iterator[Computable]]:
    def changes(operation: Any, failing: FailingSite) -> Iterator[Computable]:
        window = _window(failing) if windowed else None
        yield masked(operation, _seen(failing, causal, window, padding))
        if causal is None:
            yield masked(operation, _seen(failing, causal, None, True))

    return changes


def _another_window(operation: Any, failing: FailingSite) -> Iterator[Change]:
    window, config = _window(failing), failing.recorded.config
    candidates = {None, config.sliding_window}
    candidates |= set() if window is None else {window + 1, window - 1, 2 * window}
    for other in candidates - {window, 0}:
        yield Change(
            masked(operation, _seen(failing, 0, other, False)),
            f"The port seems to attend over {_tokens(other)}; this layer attends over "
            f"{_tokens(window)}.",
        )


def _tokens(window: int | None) -> str:
    return "all tokens so far" if window is None else f"a window of {window} tokens"


def _inverted(operation: Any, failing: FailingSite) -> Iterator[Computable]:
    yield masked(operation, ~operation.mask)


def _itself_only(operation: Any, failing: FailingSite) -> Iterator[Computable]:
    yield masked(operation, np.eye(failing.recorded.count, dtype=bool)[None])


def _bools_added(operation: Any, failing: FailingSite) -> Iterator[Computable]:
    yield masked(operation, operation.mask.astype(np.float64))


def _another_scale(operation: Any, failing: FailingSite) -> Iterator[Change]:
    config = failing.recorded.config
    heads, width = config.num_attention_heads, config.head_dim
    words: dict[float, list[str]] = {}
    for scale, said in (
        (1.0, "1"),
        (1 / width, "1 / D"),
        (1 / math.sqrt(config.hidden_size), "1 / sqrt(hidden_size)"),
        (1 / math.sqrt(heads * width), "1 / sqrt(num_attention_heads D)"),
        (1 / math.sqrt(heads), "1 / sqrt(num_attention_heads)"),
        (1 / math.sqrt(config.num_key_value_heads), "1 / sqrt(num_key_value_heads)"),
        (1 / math.sqrt(width // 2), "1 / sqrt(D / 2)"),
        (math.sqrt(width), "sqrt(D)"),
        (operation.scale * math.log(2), "1 / sqrt(D), and to raise 2 to the scores, not e"),
    ):
        words.setdefault(scale, []).append(said)
    for scale, spellings in words.items():
        if not math.isclose(scale, operation.scale):
            yield Change(
                replace(operation, scale=scale),
                f"The port seems to scale scores with {' or '.join(spellings)}; it should be "
                "1 / sqrt(D).",
            )


def _groups(
    of: Callable[[int, int], list[int]],
) -> Callable[[Any, FailingSite], Iterator[Computable]]:
    """Keys and values of other heads: `of` gives one for each query head."""

    def changes(operation: Any, failing: FailingSite) -> Iterator[Computable]:
        config = failing.recorded.config
        if config.num_key_value_heads == 1:
            return
        heads = of(config.num_attention_heads, config.num_key_value_heads)
        k, v = (getattr(operation, name, None) for name in "kv")
        each = [None if y is None else y[:, :, heads] for y in (k, v)]
        yield with_fields(operation, k=each[0], v=each[1])
        if k is not None and v is not None:
            group = config.num_attention_heads // config.num_key_value_heads
            right = [np.repeat(y, group, axis=2) for y in (k, v)]
            yield replace(operation, k=each[0], v=right[1])
            yield replace(operation, k=right[0], v=each[1])

    return changes


def _tiled(heads: int, groups: int) -> list[int]:
    return [head % groups for head in range(heads)]


def _first_only(heads: int, groups: int) -> list[int]:
    return [0] * heads


def _reversed(heads: int, groups: int) -> list[int]:
    return [groups - 1 - head * groups // heads for head in range(heads)]


_GROUPED = Attention | Probabilities | Scores | WeightedSum

HYPOTHESES = (
    Hypothesis(
        "no causal mask",
        _Masked,
        _with(causal=None),
        "The port seems to let a token see later ones; it should see itself and earlier ones.",
    ),
    Hypothesis(
        "a token does not see itself",
        _Masked,
        _with(causal=-1),
        "The port's mask seems to be off by one: a token sees only those before it, not itself.",
    ),
    Hypothesis(
        "a token sees the next",
        _Masked,
        _with(causal=1),
        "The port's mask seems to be off by one: a token sees the one after it.",
    ),
    Hypothesis("another window", _Masked, _another_window),
    Hypothesis(
        "padding seen",
        _Masked,
        _with(padding=True),
        "The port seems to attend to padding; the attention mask hides it.",
    ),
    Hypothesis(
        "mask inverted",
        _Masked,
        _inverted,
        "The port seems to attend to what the mask hides, and not to what it allows.",
    ),
    Hypothesis(
        "a token sees only itself",
        _Masked,
        _itself_only,
        "The port seems to let a token attend to itself alone: earlier keys and values are not "
        "read.",
    ),
    Hypothesis(
        "mask added as 0 and 1",
        _Masked,
        _bools_added,
        "The port seems to add a mask of zeros and ones to the scores; it should be minus infinity "
        "and 0.",
    ),
    Hypothesis("another scale of scores", _Scaled, _another_scale),
    Hypothesis(
        "key heads tiled",
        _GROUPED,
        _groups(_tiled),
        "The port seems to give query head h the key or value head h mod kv_heads; it should be "
        "h // (heads / kv_heads): repeat, do not tile.",
    ),
    Hypothesis(
        "first key head for all",
        _GROUPED,
        _groups(_first_only),
        "The port seems to give the first key or value head to every query head.",
    ),
    Hypothesis(
        "key heads in reverse order",
        _GROUPED,
        _groups(_reversed),
        "The port seems to take key or value heads in reverse order.",
    ),
)
