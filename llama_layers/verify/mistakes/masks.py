"""Mistakes in which tokens attention sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.mistakes.registry import Changed, Computed, mistake
from llama_layers.verify.operations import Attention, Probabilities, Softmax

MASKED = Attention | Probabilities | Softmax


def seen(
    at: FailingSite, causal: int | None, window: int | None, padding: bool
) -> NDArray[np.bool_]:
    """The keys that are seen: up to `causal` tokens ahead, within a window, padding or not."""
    queries, keys = np.indices((at.recorded.count,) * 2)
    seen = np.ones(queries.shape, bool) if causal is None else keys <= queries + causal
    if window is not None:
        seen &= keys > queries - window
    keep = at.recorded.keep
    return seen[None] if keep is None or padding else seen & keep[:, None, :]


def window_of(at: FailingSite) -> int | None:
    """The window of the site's layer."""
    assert at.site.layer is not None  # attention is inside a layer
    return at.config.window_of(at.site.layer)


def masked(operation: MASKED, mask: np.ndarray) -> Computable:
    """The operation with another mask; rows that see nothing may be anything, then."""
    changed = replace(operation, mask=mask)
    empty = np.asarray(~mask.any(axis=-1) if mask.dtype == bool else False)
    if not empty.any():
        return changed
    axes = np.s_[:, :, None, None] if isinstance(operation, Attention) else np.s_[:, None, :, None]

    def few(tokens: NDArray[np.intp]) -> Computable | None:
        some = changed.at_tokens(tokens)
        return None if some is None else masked(some, np.asarray(some.mask))

    return Computed(lambda how: changed.bound(how).only(~empty[axes]), few)


@mistake(MASKED, "no causal mask", common=1, parts=True)
def _(operation: MASKED, at: FailingSite) -> Iterator[Computable]:
    """Lets a token see later ones; it should let it see itself and earlier ones."""
    yield masked(operation, seen(at, None, window_of(at), False))
    yield masked(operation, seen(at, None, None, True))


@mistake(MASKED, "a token does not see itself", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable:
    """Has a mask that is off by one, so that a token sees only those before it; it should let it
    see itself, too."""
    return masked(operation, seen(at, -1, window_of(at), False))


@mistake(MASKED, "a token sees the next", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable:
    """Has a mask that is off by one, so that a token sees the one after it; it should hide that."""
    return masked(operation, seen(at, 1, window_of(at), False))


@mistake(MASKED, "another window", common=1, parts=True)
def _(operation: MASKED, at: FailingSite) -> Iterator[Changed]:
    """Attends over {0}; it should attend over {1} in this layer."""
    window = window_of(at)
    others = [None, at.config.sliding_window]
    others += [] if window is None else [window + 1, window - 1, 2 * window]
    for other in dict.fromkeys(others):
        if other not in (window, 0):
            mask = seen(at, 0, other, False)
            yield masked(operation, mask), _tokens(other), _tokens(window)


def _tokens(window: int | None) -> str:
    return "all tokens so far" if window is None else f"a window of {window} tokens"


@mistake(MASKED, "padding seen", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable:
    """Attends to padding; it should hide it, as the attention mask says."""
    return masked(operation, seen(at, 0, window_of(at), True))


@mistake(MASKED, "padding at the other end", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable | None:
    """Hides as many tokens at the other end of each sequence; it should hide those of padding."""
    keep = at.recorded.keep
    if keep is None:
        return None
    return masked(operation, seen(at, 0, window_of(at), True) & keep[:, None, ::-1])


@mistake(MASKED, "mask inverted", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable:
    """Attends to what the mask hides, and not to what it allows."""
    return masked(operation, ~np.asarray(operation.mask))


@mistake(MASKED, "mask transposed", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable:
    """Lets a token see itself and later ones; it should let it see itself and earlier ones:
    transpose the mask."""
    return masked(operation, np.swapaxes(np.asarray(operation.mask), -1, -2))


@mistake(MASKED, "a token sees only itself", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable:
    """Lets a token attend to itself alone; it should read earlier keys and values, too."""
    return masked(operation, np.eye(at.recorded.count, dtype=bool)[None])


@mistake(MASKED, "mask added as 0 and 1", parts=True)
def _(operation: MASKED, at: FailingSite) -> Computable:
    """Adds a mask of zeros and ones to the scores; it should add minus infinity and 0."""
    return masked(operation, np.asarray(operation.mask, np.float64))
