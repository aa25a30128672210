"""Types of config fields, each with the check of its values; messages say what came."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Annotated, Any, get_args, get_type_hints

from llama_layers.errors import ConfigError, shown


def check_count(name: str, value: object, most: int = 2**53) -> None:
    """Raise ConfigError unless a value is a positive integer, up to what float64 counts exactly."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected a positive integer, got {shown(value)}")
    if value > most:
        raise ConfigError(f"{name}: expected at most {most}, got {shown(value)}")


def check_positive(name: str, value: Any, least: float = 1e-30, most: float = 1e30) -> None:
    """Raise ConfigError unless a value is a positive number within limits.

    The default limits are far beyond any published number, and near enough that no power, product
    or quotient of such numbers leaves float64.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{name}: expected a positive finite number, got {shown(value)}")
    if not least <= value <= most:
        raise ConfigError(
            f"{name}: expected a number from {least:g} to {most:g}, got {shown(value)}"
        )


def check_flag(name: str, value: object) -> None:
    """Raise ConfigError unless a value is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {shown(value)}")


def check_name(name: str, value: object, known: Collection[str]) -> None:
    """Raise ConfigError unless a value is one of some known names."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name}: expected one of {', '.join(known)}, got {shown(value)}")


def check_integers(name: str, value: object) -> None:
    """Raise ConfigError unless a value is an integer or a tuple of integers."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(f"{name}: expected an integer, got {shown(number)}")


def check_integer(name: str, value: object) -> None:
    """Raise ConfigError unless a value is an integer."""
    check_integers(name, (value,))


# Powers and squares of RoPE's factors must stay finite in float32 too.
check_factor = partial(check_positive, least=1e-6, most=1e6)


def check_factors(name: str, value: object) -> None:
    """Raise ConfigError unless a value is a tuple of factors of RoPE's frequencies."""
    if not isinstance(value, tuple):
        raise ConfigError(f"{name}: expected a list of numbers, got {shown(value)}")
    for number in value:
        check_factor(name, number)


def check_thetas(name: str, value: object) -> None:
    """Raise ConfigError unless a value is a tuple of positive numbers, or 0 for layers without."""
    if not isinstance(value, tuple):
        raise ConfigError(f"{name}: expected a list of numbers, got {shown(value)}")
    for number in value:
        if number != 0 or isinstance(number, bool):
            check_positive(name, number)


def check_share(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is a number above 0 and up to 1."""
    check_positive(name, value, most=1.0)


def check_not_negative(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is 0 or a positive number."""
    if value != 0 or isinstance(value, bool):
        check_positive(name, value)


# RoPE's tables are made from a config alone, with an entry for each pair of channels, and layers
# are counted: a malformed file must not fill the memory. Published models have up to 126 layers
# and heads of 512.
check_layer_count = partial(check_count, most=10_000)
check_head_dim = partial(check_count, most=65_536)

Count = Annotated[int, check_count]
LayerCount = Annotated[int, check_layer_count]
HeadDim = Annotated[int, check_head_dim]
Positive = Annotated[float, check_positive]
Flag = Annotated[bool, check_flag]
TokenId = Annotated[int, check_integer]
TokenIds = Annotated[int | tuple[int, ...], check_integers]
Factor = Annotated[float, check_factor]


def check_fields(config: object) -> None:
    """Call the check in the type of each field; None is fine where the type allows it."""
    kind: Any = type(config)
    for name, check, optional in _checks(kind):
        value = getattr(config, name)
        if not (optional and value is None):
            check(name, value)


@cache
def _checks(kind: Any) -> list[tuple[str, Callable[[str, object], None], bool]]:
    """For each field its name, the check in its type, and whether it may be None."""
    found = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        optional = type(None) in get_args(hint)
        for part in (hint, *get_args(hint)):
            for check in getattr(part, "__metadata__", ()):
                found.append((name, check, optional))
    return found
