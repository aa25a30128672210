"""The types of arguments and results. Type checkers and editors read ``types.pyi`` instead."""

from types import ModuleType
from typing import Any, TypeVar

Array = DType = Device = Any
Number = float
ArrayT = TypeVar("ArrayT")
Namespace = ModuleType
