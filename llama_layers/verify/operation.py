"""The base of all operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.types import Array
from llama_layers.verify.bound import Bound
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.tracked import Tracked, read

# What a formula gets; what the fields hold: arrays, or in the view tracked numbers; and what they
# hold where the view is of another class.
if TYPE_CHECKING:  # TypeVars of Python 3.11 have no default
    from typing_extensions import TypeVar

    View = TypeVar("View", default=Any)
    Numbers = TypeVar("Numbers", bound=Array | Tracked, default=np.ndarray)
    Stored = TypeVar("Stored", bound=Array, default=np.ndarray)
else:
    from typing import TypeVar

    View, Numbers, Stored = map(TypeVar, ("View", "Numbers", "Stored"))

WEIGHTS = {"weight", "bias", "table"}
"""Fields that hold arrays of the model, not of the trace."""

# The axis of tokens, or of queries, in each field that has one.
_TOKEN_AXES = {
    **dict.fromkeys(("x", "gate", "up", "added", "q"), 1),
    **dict.fromkeys(("scores", "probabilities"), 2),
    "mask": -2,
}


@dataclass(frozen=True, eq=False)
class Operation(ABC, Generic[View]):
    """The base of all operations: a view of what an operation reads, and a formula over it."""

    inputs: ClassVar[tuple[str, ...]] = ()
    """The fields whose numbers an engine may round before it computes."""
    steps: ClassVar[tuple[str, ...]] = ()
    """The steps that a rounding profile may round."""
    by_token: ClassVar[bool] = False
    """Whether it computes each token, or each query, by itself."""

    @staticmethod
    @abstractmethod
    def formula(view: View) -> Tracked:
        """Compute the result from the view."""

    def check(self) -> None:  # not every operation has something to check
        """Raise ValueError or TypeError unless the fields fit each other."""

    def at_tokens(self, tokens: NDArray[np.intp]) -> Self | None:
        """The operation at some tokens, or queries; None unless it computes each by itself.

        None, too, where an input was recorded in parts.
        """
        if not self.by_token or vars(self).get("parts") is not None:
            return None
        fields = {name: getattr(self, name, None) for name in _TOKEN_AXES}
        some = {n: y.take(tokens, _TOKEN_AXES[n]) for n, y in fields.items() if y is not None}
        return replace(self, **some)

    def read(self, how: Rounding) -> View:
        """The view that `formula` is evaluated on: by default all inputs as tracked numbers."""
        arrays = {name: getattr(self, name) for name in self.inputs}
        numbers = {n: read(n, a, how, recorded=n not in WEIGHTS) for n, a in arrays.items()}
        view: Any = replace(self, **numbers)
        view.check()
        return view

    def evaluate(self, formula: Callable[[View], Tracked], how: Rounding) -> Bound:
        """The exact result of a formula, right or wrong, and what rounding allows."""
        return formula(self.read(how.inside(self.steps))).bound()

    def bound(self, how: Rounding) -> Bound:
        """The exact result of the operation, and what rounding allows."""
        return self.evaluate(type(self).formula, how)
