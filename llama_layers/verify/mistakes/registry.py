"""The register of mistakes that ports make: each is defined once, by `mistake`.

A mistake is a wrong formula. Its one parameter is the operation's fields as tracked numbers (see
`llama_layers.verify.operations`), and its docstring says what the port does and what it should::

    @mistake(Norm, "eps outside the root")
    def _(n: Norm[Tracked]) -> Tracked:
        \"\"\"Adds eps to the root; it should add it to the mean square, under it.\"\"\"
        return n.x / ((n.x * n.x).mean().sqrt() + n.eps) * n.weight

Or it is the right formula of something else. Then it has two parameters, the operation and the
`FailingSite`. It gives the operation that the port may have computed, yields several, or gives
None where the mistake cannot be made. What comes with an operation in a tuple goes into the braces
of the sentence::

    @mistake(Norm, "another eps")
    def _(norm: Norm, at: FailingSite) -> Iterator[Changed]:
        \"\"\"Adds an eps of {0:g}; it should add {1:g}.\"\"\"
        yield from ((replace(norm, eps=eps), eps, norm.eps) for eps in (1e-5, 1e-6))

Diagnosis tries every mistake of the register, and the documentation lists them.

A mistake that only widens the limit (``loosens=True``) would hold the arrays of many others, so it
needs a test of its own (``shows=``): an explanation predicts, and does not only excuse.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from types import UnionType
from typing import Any, NamedTuple, TypeVar, TypeVarTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.verify.bound import Bound
from llama_layers.verify.failing_site import Computable, FailingSite
from llama_layers.verify.operation import Operation, View
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.roundoff import Float64Array
from llama_layers.verify.tracked import Tracked

Changed = Computable | tuple[Computable, *tuple[object, ...]]
"""An operation with a mistake, or one with the words that go into the sentence."""
F = TypeVar("F", bound=Callable[..., Tracked | Changed | Iterator[Changed] | None])
More = TypeVarTuple("More")


class Kind(IntEnum):
    """What a mistake is about; one kind is tried after the other, until one explains."""

    FORMULA = 0
    """Another formula, another weight, another input."""
    ROUNDING = 1
    """The right formula in fewer bits."""
    SOLVED = 2
    """Something about the mistake is found from the port's own array."""
    FITTED = 3
    """A number for each token or each output is fitted to the port's own array."""


class Change(NamedTuple):
    """An operation with a mistake."""

    operation: Computable
    """What the port would have computed."""
    detail: str
    """A sentence: what it seems to do, and what it should."""


@dataclass(frozen=True, eq=False)
class Computed:
    """A result whose bound a function gives."""

    bound: Callable[[Rounding], Bound]
    """The exact result, and what rounding allows."""
    few: Callable[[NDArray[np.intp]], Computable | None] | None = None
    """Gives the result at some tokens, where each is computed by itself."""

    def at_tokens(self, tokens: NDArray[np.intp]) -> Computable | None:
        """The result at some tokens; None unless each is computed by itself."""
        return None if self.few is None else self.few(tokens)


@dataclass(frozen=True)
class Mistake:
    """A mistake that a port may have made.

    Attributes
    ----------
    name : str
        A few words.
    operations : type or union of types
        The operations in which it can be made.
    change : callable
        A formula over the operation's view; or a function of operation and failing site.
    text : str
        "Adds eps to the root; it should add it under it.", or a whole sentence that begins with
        "The". Words that go with an operation replace ``{0}`` and so on.
    roles : collection of str
        The sites in which it can be made; empty for all of the operation.
    kind : Kind
        What it is about.
    loosens : bool
        Whether it allows larger errors around the same result, not another result; the port's
        array must show it in another way, then.
    shows : callable or None
        That way: whether the array of a failing site, within the bound with the mistake, looks as
        the mistake makes it look. None unless it `loosens`.
    parts : bool
        Whether it can be made in some heads or channels only, as any formula can.
    mixes : bool
        Whether it is a formula in which a token's result depends on what is computed of others.
    common : int
        How many of its first forms are also looked for in all operations at once, where inputs
        were not recorded.
    """

    name: str
    operations: type | UnionType
    change: Callable[..., Any]
    text: str
    roles: Collection[str] = ()
    kind: Kind = Kind.FORMULA
    loosens: bool = False
    common: int = 0
    shows: Callable[[FailingSite, Bound], bool] | None = None
    parts: bool = False
    mixes: bool = False

    def __post_init__(self) -> None:
        if self.loosens != (self.shows is not None):
            raise ValueError(
                f"shows: expected a test of its own for a mistake that loosens, and for no other: "
                f"{self.name}"
            )

    @cached_property
    def formula(self) -> bool:
        """Whether it is a formula over the operation's view."""
        return len(inspect.signature(self.change).parameters) == 1

    def applied(self, at: FailingSite) -> Iterator[Change]:
        """The operations with the mistake; none where it could not have been made."""
        if (
            isinstance(at.operation, self.operations)
            and (not self.roles or at.site.role in self.roles)
            and (self._fits_a_past or not at.has_past)
        ):
            for operation, *words in self._changed(at.operation, at):
                yield Change(operation, self.sentence(*words))

    @property
    def shows_in_parts(self) -> bool:
        """Whether some heads or channels can be wrong by it, and the others right."""
        return self.formula or self.parts

    @property
    def _fits_a_past(self) -> bool:
        """Whether it can be made where keys of the past come before those of the trace."""
        return self.formula or self.kind == Kind.ROUNDING or self.loosens

    def _changed(
        self, operation: Operation, at: FailingSite
    ) -> Iterator[tuple[Computable, *tuple[object, ...]]]:
        if self.formula:
            yield ((evaluated if self.mixes else by_token)(operation, self.change),)
            return
        found = self.change(operation, at)
        for each in found if isinstance(found, Iterator) else () if found is None else (found,):
            yield each if isinstance(each, tuple) else (each,)

    def sentence(self, *words: object) -> str:
        """What the port seems to do, and what it should do instead."""
        text = self.text.format(*words)
        if self.text.startswith(("The ", "{")):
            return text
        does, semicolon, should = text.partition(";")
        return f"The port seems {_infinitive(does)}{semicolon}{should}"


def _infinitive(does: str) -> str:
    """Turn "Adds eps" into "to add eps", and "Does not add it" into "not to add it"."""
    if does.startswith("Does not "):
        return f"not to {does.removeprefix('Does not ')}"
    verb, space, rest = does.partition(" ")
    verb = verb.lower()
    for ending, instead in (("has", "have"), ("ies", "y"), ("sses", "ss"), ("oes", "o"), ("s", "")):
        if verb.endswith(ending):
            return f"to {verb.removesuffix(ending)}{instead}{space}{rest}"
    raise ValueError(f"text: expected a verb in the third person first, got {verb!r}")


REGISTERED: defaultdict[str, list[Mistake]] = defaultdict(list)
"""The mistakes of each module."""


def mistake(
    operations: type | UnionType,
    name: str,
    *,
    says: str = "",
    roles: Collection[str] = (),
    kind: Kind = Kind.FORMULA,
    loosens: bool = False,
    shows: Callable[[FailingSite, Bound], bool] | None = None,
    common: int = 0,
    parts: bool = False,
    mixes: bool = False,
) -> Callable[[F], F]:
    """Register a function as a mistake: see `Mistake`. `says` replaces the docstring."""

    def register(change: F) -> F:
        text = says or " ".join((change.__doc__ or f"The port has: {name}.").split())
        made = (name, operations, change, text, roles, kind, loosens, common, shows, parts, mixes)
        REGISTERED[change.__module__].append(Mistake(*made))
        return change

    return register


def evaluated(
    operation: Operation[View], formula: Callable[[View, *More], Tracked], *more: *More
) -> Computed:
    """An operation with a wrong formula, of its view and more; it has a bound as any other."""
    return Computed(lambda how: operation.evaluate(lambda view: formula(view, *more), how))


def by_token(
    operation: Operation[View], formula: Callable[[View, *More], Tracked], *more: *More
) -> Computed:
    """An operation with a wrong formula that computes each token by itself."""

    def few(tokens: NDArray[np.intp]) -> Computed | None:
        some = operation.at_tokens(tokens)
        return None if some is None else evaluated(some, formula, *more)

    return replace(evaluated(operation, formula, *more), few=few)


def moved(
    operation: Computable, move: Callable[[Float64Array, *More], Float64Array], *more: *More
) -> Computed:
    """The result of an operation with its elements in other places, or scaled."""

    def bound(how: Rounding) -> Bound:
        right = operation.bound(how)
        exact, *errors = (move(part, *more) for part in (right.exact, right.limit, right.usual))
        return Bound(exact, *map(abs, errors))

    return Computed(bound)
