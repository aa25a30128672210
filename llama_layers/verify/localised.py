"""Where a mistake shows, said before what it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def localised(
    detail: str, tokens: NDArray[np.bool_], explained: NDArray[np.bool_], parts: str
) -> str:
    """The detail, after the sequences, tokens and parts that show the mistake, if some do not.

    Tokens [B, S] are those that are wrong, and those that the mistake explains; parts, such as
    "head 1", are empty where all are wrong.
    """
    rows, numbers = (np.flatnonzero(tokens.any(axis=axis)) for axis in (1, 0))
    places = [parts] if parts else []
    sequences = ""
    if not explained.all():
        if not explained[rows].all():
            places.append(counted_as("token", numbers))
        sequences = counted_as("sequence", rows) if len(rows) < len(tokens) else ""
    if places:
        where = f"At {' and '.join(places)}" + (f" of {sequences}" if sequences else "")
    elif sequences:
        where = f"In {sequences}"
    else:
        return detail
    said = f"the {detail.removeprefix('The ')}" if detail.startswith("The ") else detail
    return f"{where} only: {said}"


def counted_as(what: str, numbers: NDArray[np.intp]) -> str:
    """Numbers of things: "token 3", "tokens 3..5", or how many."""
    first, last = numbers[0], numbers[-1]
    if first == last:
        return f"{what} {first}"
    if len(numbers) == last - first + 1:
        return f"{what}s {first}..{last}"
    return f"{len(numbers)} {what}s, the first {first} and the last {last}"
