"""The right formula in too few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import Computable, FailingSite, wide
from llama_layers.verify.mistakes.attention import GROUPED
from llama_layers.verify.mistakes.registry import Computed, Kind, evaluated, mistake
from llama_layers.verify.operation import WEIGHTS
from llama_layers.verify.operations import Embedding, Linear, Norm, Operation
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import read_in

NARROW = ("bfloat16", "float16")
# How TF32 is rounded: what is added to a float32's bits before the last 13 are cut off. To even,
# the last bit that is kept is added, too.
NEAREST, EVEN, CUT_OFF = 0x1000, 0xFFF, 0


def in_each_narrow_format(register: Callable[[str], None]) -> None:
    """Register a mistake for each of the formats that have fewer bits than sums need."""
    for narrow in NARROW:
        register(narrow)


def tf32(array: np.ndarray, half: int) -> NDArray[np.float32]:
    """Numbers of 10 bits after the point: the other 13 are cut off, after `half` was added."""
    numbers = np.array(array, np.float32)
    odd = ~np.isfinite(numbers)
    kept = numbers[odd]
    bits = numbers.view(np.uint32)
    if half == EVEN:
        bits += (bits >> np.uint32(13)) & np.uint32(1)
    bits += np.uint32(half)
    bits &= np.uint32(0xFFFFE000)
    numbers[odd] = kept
    return numbers


def narrowed(array: np.ndarray, narrow: str) -> NDArray[np.float32]:
    """An array's numbers in a narrow format, as float32."""
    with np.errstate(over="ignore"):
        return read_in(wide(array), FLOATS[narrow]).astype(np.float32)


def _rounded(
    operation: Operation, rounding: Callable[[np.ndarray], np.ndarray], *, parts: bool
) -> Iterator[Computable]:
    """All inputs rounded, and if `parts` some of them; but weights alone are another mistake."""
    names = operation.inputs
    rounded = {name: rounding(getattr(operation, name)) for name in names}
    told = {
        name
        for name in set(names) - WEIGHTS
        if not parts or not np.array_equal(rounded[name], wide(getattr(operation, name)))
    }
    for count in range(len(names), 0, -1) if parts else (len(names),):
        for some in combinations(names, count):
            if told.intersection(some):
                yield replace(operation, **{n: rounded[n] for n in some})


@mistake(Linear | GROUPED, "inputs rounded to TF32", kind=Kind.ROUNDING)
def _(operation: Linear | GROUPED, at: FailingSite) -> Iterator[Computable]:
    """Multiplies in TF32, with 10 bits after the point; it should multiply in float32."""
    for half in (NEAREST, EVEN, CUT_OFF):
        yield from _rounded(operation, partial(tf32, half=half), parts=False)


@in_each_narrow_format
def _inputs_in(narrow: str) -> None:
    @mistake(
        Operation,
        f"inputs rounded to {narrow}",
        kind=Kind.ROUNDING,
        says=f"Rounds inputs to {narrow} before it computes.",
    )
    def _(operation: Operation, at: FailingSite) -> Iterator[Computable]:
        return _rounded(operation, lambda y: narrowed(y, narrow), parts=True)


@in_each_narrow_format
def _weights_in(narrow: str) -> None:
    @mistake(
        Linear | Norm | Embedding,
        f"weights rounded to {narrow}",
        kind=Kind.ROUNDING,
        says=f"The port seems to have rounded the model's weights to {narrow} when it loaded them. "
        f"If that is meant, hold it against those: --weights-dtype {narrow}, in Python "
        f"load(..., dtype={narrow!r}).",
    )
    def _(operation: Operation, at: FailingSite) -> Iterator[Computable]:
        weights = {n: y for n in WEIGHTS if (y := getattr(operation, n, None)) is not None}
        rounded = {n: narrowed(y, narrow) for n, y in weights.items()}
        yield replace(operation, **rounded)
        if rounded.pop("bias", None) is not None:
            yield replace(operation, **rounded)


# Of all elements, the share that must be the exact result, rounded.
_EXACTLY = 0.9


@in_each_narrow_format
def _result_in(narrow: str) -> None:
    def shows(at: FailingSite, bound: Bound) -> bool:
        """Whether nearly all numbers are what the exact ones are rounded to."""
        finite = np.isfinite(bound.limit) & np.isfinite(bound.exact)
        same = wide(at.computed) == wide(narrowed(bound.exact, narrow))
        return bool(np.count_nonzero(same & finite) >= _EXACTLY * np.count_nonzero(finite))

    @mistake(
        Operation,
        f"result rounded to {narrow}",
        kind=Kind.ROUNDING,
        loosens=True,
        shows=shows,
        says=f"The port's numbers are all numbers of {narrow}, and within its rounding.",
    )
    def _(operation: Operation, at: FailingSite) -> Computable | None:
        narrower = FLOATS[narrow].precision < FLOATS[at.formats.dtype].precision
        if not narrower or not are_numbers_of(narrow, at.computed):
            return None

        def bound(how: Rounding) -> Bound:
            found = operation.bound(replace(how, dtype=narrow))
            rounded, theirs = wide(narrowed(found.exact, narrow)), wide(at.computed)
            return replace(found, exact=np.where(theirs == rounded, rounded, found.exact))

        return Computed(bound)


def are_numbers_of(narrow: str, array: np.ndarray) -> bool:
    """Whether every finite number of an array is one of a narrower format."""
    numbers = wide(array)
    numbers = numbers[np.isfinite(numbers)]
    return bool((narrowed(numbers, narrow) == numbers).all())


@mistake(Operation, "result cut off", kind=Kind.ROUNDING)
def _(operation: Operation, at: FailingSite) -> Computable | None:
    """Cuts results off to their format; it should round them to nearest."""
    # Half a unit in the last place below the exact result, and as much around it.
    out = FLOATS[at.formats.dtype]
    if out.precision >= FLOATS[at.formats.accumulate].precision:
        return None

    def bound(how: Rounding) -> Bound:
        right = operation.bound(replace(how, dtype=how.accumulate))
        with np.errstate(all="ignore"):
            _, exponent = np.frexp(right.exact)
            unit = np.ldexp(2.0 * out.unit_roundoff, exponent - 1)
            unit = np.maximum(unit, out.smallest_subnormal)
        below = right.exact - np.sign(right.exact) * unit / 2
        return Bound(below, unit / 2 + right.limit, unit / 2 + right.usual)

    return Computed(bound)


# The fewest tokens whose means tell a format, and how near to numbers of it they must be, in unit
# roundoffs: by chance it is 0.3 to 0.6.
_MEANS, _NEAR = 3, 0.15


@in_each_narrow_format
def _mean_in(narrow: str) -> None:
    @mistake(
        Norm,
        f"norm's mean in {narrow}",
        kind=Kind.ROUNDING,
        says=f"The mean square of each token seems to be a number of {narrow}; sums need float32 "
        "or more.",
    )
    def _(norm: Norm, at: FailingSite) -> Computable | None:
        """The mean square of each token as a narrow number, read off the port's rows."""
        square = np.mean(np.square(wide(norm.x)), axis=-1, keepdims=True)
        normed = wide(norm.x) * norm.scale
        with np.errstate(all="ignore"):
            factor = np.sum(wide(at.computed) * normed, axis=-1, keepdims=True)
            factor /= np.sum(np.square(normed), axis=-1, keepdims=True)
            found = factor**-2.0 - norm.eps
            mean = wide(narrowed(found, narrow))
            off = np.abs(mean / square - 1)
            # Any number is within half a unit of a narrow one; these must be far nearer.
            near = np.sqrt(np.mean(np.square((found / mean - 1) / FLOATS[narrow].unit_roundoff)))
        if mean.size < _MEANS or not near <= _NEAR:
            return None
        # Whatever is summed in so few bits: the sum may stop to grow long before its end.
        coarse = narrow != "bfloat16" and np.array_equal(narrowed(mean, "bfloat16"), mean)
        if coarse or not np.isfinite(off).all() or not 0 < off.max() < 0.9:
            return None  # numbers of both formats: the coarser one tells more
        root = np.sqrt(mean + norm.eps)
        return evaluated(norm, lambda n: n.x / root * n.weight)
