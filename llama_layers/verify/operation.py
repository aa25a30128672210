"""What all operations have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_layers.verify.bound import Bound
from llama_layers.verify.profiles import Rounding
from llama_layers.verify.tracked import Tracked


class Operation:
    """What operations have in common: a view of what they read, and a formula over it."""

    formula: Callable[[Any], Tracked]

    def read(self, how: Rounding) -> Any:
        """The view that `formula` is evaluated on."""
        raise NotImplementedError

    def evaluate(self, formula: Callable[[Any], Tracked], how: Rounding) -> Bound:
        """The exact result of a formula, right or wrong, and what rounding allows."""
        return formula(self.read(how)).bound()

    def bound(self, how: Rounding) -> Bound:
        """The exact result of the operation, and what rounding allows."""
        return self.evaluate(type(self).formula, how)
