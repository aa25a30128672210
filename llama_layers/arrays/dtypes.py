"""The floating-point formats that Llama checkpoints and activations come in.

The array API standard has no bfloat16: NumPy and CuPy borrow it from ml_dtypes, torch and jax have
their own. So formats are told apart by name, and only here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from llama_layers.arrays.types import Array, DType, Namespace


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format with gradual underflow (IEEE 754-2019, section 3.3)."""

    name: str
    itemsize: int
    """Bytes of one number."""
    precision: int
    """Bits of the significand, the hidden one included."""
    min_exponent: int
    """Exponent of the smallest normal number."""
    max_exponent: int
    """Exponent of the largest finite number."""

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding to nearest."""
        return 2.0**-self.precision

    @property
    def max(self) -> float:
        """Largest finite number."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0**self.max_exponent

    @property
    def smallest_normal(self) -> float:
        """Smallest positive number of full precision."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive number."""
        return 2.0 ** (self.min_exponent - self.precision + 1)

    def holds(self, other: FloatFormat) -> bool:
        """Whether every number of the other format is a number of this one."""
        return (
            self.precision >= other.precision
            and self.max_exponent >= other.max_exponent
            and self.smallest_subnormal <= other.smallest_subnormal
        )


FLOATS = {
    f.name: f
    for f in (
        FloatFormat("float16", 2, 11, -14, 15),
        FloatFormat("bfloat16", 2, 8, -126, 127),
        FloatFormat("float32", 4, 24, -126, 127),
        FloatFormat("float64", 8, 53, -1022, 1023),
    )
}

INTEGERS = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def dtype_name(dtype: DType) -> str:
    """The name of any library's dtype: ``torch.bfloat16`` and ml_dtypes' are both 'bfloat16'."""
    if isinstance(dtype, np.dtype):
        return _numpy_name(dtype)
    return getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]


@cache
def _numpy_name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # which NumPy makes anew each time, in several microseconds


def check_array(name: str, array: Array) -> None:
    """Raise TypeError unless a value is an array; None stands for an argument that is not given."""
    if not hasattr(array, "dtype"):
        raise TypeError(f"{name}: expected an array, got {type(array).__name__}")


def check_integers(name: str, array: Array) -> None:
    """Raise TypeError unless a value is an array of integers."""
    check_array(name, array)
    if (found := dtype_name(array.dtype)) not in INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {found}")


def check_bools(name: str, array: Array) -> None:
    """Raise TypeError unless a value is an array of bools."""
    check_array(name, array)
    if (found := dtype_name(array.dtype)) != "bool":
        raise TypeError(f"{name}: expected bool, got {found}")


def float_format(name: str, array: Array) -> FloatFormat:
    """The format of an array's numbers; raises TypeError unless they are of one in `FLOATS`."""
    check_array(name, array)
    found = dtype_name(array.dtype)
    if found not in FLOATS:
        raise TypeError(f"{name}: expected one of the dtypes {', '.join(FLOATS)}, got {found}")
    return FLOATS[found]


def check_sums_hold(x: Array, **arrays: Array) -> None:
    """Raise TypeError if the sums for x do not hold the numbers of an array exactly."""
    form = float_format("x", x)
    sums = accumulate_format(form)
    for name, array in arrays.items():
        if not sums.holds(found := float_format(name, array)):
            raise TypeError(
                f"{name}: expected a dtype that {sums.name} sums hold exactly (x is {form.name}), "
                f"got {found.name}; cast one of them"
            )


def dtype_of(xp: Namespace, name: str) -> Any:
    """The dtype of that name in a namespace."""
    if name == "bfloat16" and not hasattr(xp, name):
        return np.dtype(ml_dtypes.bfloat16)
    return getattr(xp, name)


def accumulate_format(x: FloatFormat) -> FloatFormat:
    """The format of sums over numbers of format x: at least float32."""
    return FLOATS["float64" if x.name == "float64" else "float32"]
