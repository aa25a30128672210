"""The tokens of a trace: which they are, where they stand, and which are padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import TraceError

# Phases are computed in float64, in which larger positions are not whole numbers.
_FARTHEST = 2**53


def valid_tokens(
    mask: Array | None, batch: int, count: int, before: int
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Return which tokens are not padding, and which of the past, if the mask has those too."""
    if mask is None:
        return None, None
    keep = np.atleast_2d(to_numpy(mask))
    if keep.dtype.kind not in "biuf":
        raise TraceError(f"attention_mask: expected 0 and 1, got {keep.dtype}")
    if keep.shape not in ((batch, count), (batch, before + count)):
        whole = f" or [{batch}, {before + count}]" if before else ""
        raise TraceError(
            f"attention_mask: expected 0 and 1 in shape [{batch}, {count}]{whole}, got "
            f"{list(keep.shape)}"
        )
    odd = np.argwhere(~np.isin(keep, (0, 1)))
    if len(odd):
        place = tuple(int(i) for i in odd[0])
        raise TraceError(
            f"attention_mask: expected 0 and 1, as Hugging Face has it, got {keep[place]} at "
            f"{list(place)}"
        )
    parts = [part.astype(bool) for part in (keep[:, -count:], keep[:, :-count])]
    own, past = (None if part.all() else part for part in parts)
    return own, past


def ids_of(
    input_ids: Array | None, batch: int, count: int, config: LlamaConfig
) -> NDArray[np.int64] | None:
    """Return the ids [B, S]; raise TraceError unless they are tokens of the model."""
    if input_ids is None:
        return None
    ids = np.atleast_2d(to_numpy(input_ids))
    if ids.dtype.kind not in "iu":
        raise TraceError(f"input_ids: expected integers, got {ids.dtype}")
    if ids.size and not (ids.min() >= 0 and ids.max() < config.vocab_size):
        raise TraceError(
            f"input_ids: expected ids from 0 to {config.vocab_size - 1}, got {ids.min()} to "
            f"{ids.max()}"
        )
    return ids.astype(np.int64)


def positions_of(
    given: Array | None,
    keep: NDArray[np.bool_] | None,
    keep_past: NDArray[np.bool_] | None,
    batch: int,
    count: int,
    before: int,
) -> NDArray[np.int64]:
    """Return the positions [S] or [B, S], counted where they are not given."""
    if given is None:
        first = np.asarray(before) if keep_past is None else keep_past.sum(axis=1)[:, None]
        if keep is None:
            return np.asarray(first + np.arange(count))
        return np.maximum(first + np.cumsum(keep, axis=1) - 1, 0)
    positions = to_numpy(given)
    if positions.dtype.kind not in "iu" or positions.shape not in ((count,), (batch, count)):
        raise TraceError(
            f"positions: expected integers in shape [{count}] or [{batch}, {count}], got "
            f"{positions.dtype} in {list(positions.shape)}"
        )
    if positions.size and positions.min() < 0:
        raise TraceError(f"positions: expected zero or more, got {positions.min()}")
    if positions.size and positions.max() > _FARTHEST:
        raise TraceError(
            f"positions: expected at most 2**53, which float64 still counts to, got "
            f"{positions.max()}"
        )
    return positions.astype(np.int64)


def beginning(positions: NDArray[np.int64], keep: NDArray[np.bool_] | None) -> int:
    """Return the position of the first token, if more tokens came before it than are in the trace.

    Padding may or may not be counted.
    """
    for row, places in enumerate(np.atleast_2d(positions)):
        first = 0 if keep is None else int(np.argmax(keep[row]))
        if places[first] > first:
            return int(places[first])
    return 0
