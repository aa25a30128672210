"""Log-probabilities in one shape, whichever of the usual ones they came in.

An array has one number for each token, or one for each token of the vocabulary. At position s it
tells how likely the token is that comes after token s. So an array [B, S - 1] begins with the
second token of ``input_ids``, and one of [B, n] has the last n tokens. Only `next_ids` can tell of
which token the last number of an array [B, S] is.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.errors import TraceError
from llama_layers.layers.sites import LOGPROBS
from llama_layers.verify.stored import StoredArray, stored

NextIds = NDArray[np.int64]


def next_tokens(
    given: Array | None,
    input_ids: NDArray[np.int64] | None,
    keep: NDArray[np.bool_] | None,
    extent: tuple[int, int],
    vocabulary: int,
) -> NextIds | None:
    """Return the token after each, [B, S]; -1 where it is not known, or one of the two is padding.

    `given` has them all, or those after the last tokens. Return None where nothing tells them.
    """
    batch, count = extent
    if given is None and input_ids is None:
        return None
    found = np.full((batch, count), -1)
    if input_ids is not None:
        found[:, :-1] = input_ids[:, 1:]
        if keep is not None:
            found[:, :-1][~keep[:, 1:]] = -1
    if given is not None:
        ids = to_numpy(given)
        if ids.dtype.kind not in "iu":
            raise TraceError(f"next_ids: expected integers, got {ids.dtype}")
        if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
            raise TraceError(
                f"next_ids: expected ids from 0 to {vocabulary - 1}, got {ids.min()} to {ids.max()}"
            )
        if ids.shape == (batch, count) or (batch, ids.shape) == (1, (count,)):
            found[...] = ids
        elif ids.shape in ((batch,), (batch, 1)):
            found[:, -1] = ids.reshape(batch)
        else:
            raise TraceError(
                f"next_ids: expected shape [{batch}, {count}], or [{batch}] of the last, got "
                f"{list(ids.shape)}"
            )
    if keep is not None:
        found[~keep] = -1
    return found


def columns(shape: tuple[int, ...], extent: tuple[int, int]) -> slice | None:
    """Return the positions of an array with one number for each token; None for another array."""
    batch, count = extent
    if shape[:-1] not in ((batch,), ()) or not shape or (len(shape) == 1 and batch != 1):
        return None
    if shape[-1] > count:
        return None
    return slice(0, count) if shape[-1] == count else slice(count - 1 - shape[-1], count - 1)


def fitted_logprobs(
    array: StoredArray, extent: tuple[int, int], vocabulary: int, next_ids: NextIds | None
) -> tuple[StoredArray, NextIds | None]:
    """Return an array as [B, S, 1] or [B, S or 1, vocabulary], and the tokens of its numbers.

    NaN stands where no number was given, or where it is not known of which token it is; -1 there.
    Raise TraceError for another shape, or if no number is of a known token.
    """
    batch, count = extent
    shape, dtype = array.info()
    if dtype not in FLOATS:
        raise TraceError(f"{LOGPROBS}: expected one of the dtypes {', '.join(FLOATS)}, got {dtype}")
    places = columns(shape, extent)
    if places is not None:
        if next_ids is None:
            raise TraceError(
                f"{LOGPROBS}: expected input_ids or next_ids, which say of which tokens the "
                "numbers are, got neither"
            )
        known = np.full_like(next_ids, -1)
        known[:, places] = next_ids[:, places]
        return stored({LOGPROBS: _spread(known, places, array.read())}, LOGPROBS), known
    for rows in (count, 1):
        whole = (batch, rows, vocabulary)
        if shape == whole or (batch == 1 and shape == whole[1:]):
            return array.changed(whole, partial(_reshaped, whole)), next_ids
    raise TraceError(
        f"{LOGPROBS}: expected shape [{batch}, {count - 1}] (of each token after the first), "
        f"[{batch}, {count}] (with next_ids), fewer of the last tokens, or "
        f"[{batch}, {count}, {vocabulary}], got {list(shape)}"
    )


def aligned(
    arrays: tuple[np.ndarray, np.ndarray], ids: tuple[NextIds, NextIds]
) -> tuple[np.ndarray, np.ndarray, NextIds]:
    """Return two fitted arrays in one shape, and the tokens that both know."""
    rows = min(array.shape[1] for array in arrays)
    first, second = (array[:, -rows:] for array in arrays)
    known = np.where(ids[0] == ids[1], ids[0], -1)[:, -rows:]
    if first.shape[-1] == second.shape[-1]:
        return first, second, known
    first, second = (picked(array, known)[..., None] for array in (first, second))
    return first, second, known


def picked(array: np.ndarray, ids: NextIds) -> np.ndarray:
    """Return the log-probabilities of tokens [B, S] from a fitted array; NaN where it is -1."""
    if array.shape[-1] > 1:
        array = np.take_along_axis(array, np.maximum(ids, 0)[..., None], axis=-1)
    return np.where(ids < 0, array.dtype.type(np.nan), array[..., 0])


def _spread(known: NextIds, places: slice, given: Array) -> np.ndarray:
    """Put numbers at their positions, and NaN elsewhere.

    Numbers of float32 that are stored in float64 come from a list of Python's floats.
    """
    numbers = _native(given)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = numbers.astype(np.float32)
    if numbers.dtype == np.float64 and np.array_equal(narrow, numbers, equal_nan=True):
        numbers = narrow
    spread = np.full(known.shape, np.nan, numbers.dtype)
    spread[:, places] = numbers.reshape(len(known), -1)
    spread[known < 0] = np.nan
    return spread[..., None]


def _reshaped(shape: tuple[int, ...], given: Array) -> np.ndarray:
    return _native(given).reshape(shape)


def _native(given: Array) -> np.ndarray:
    array = to_numpy(given)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
