"""Checks of the numbers in a config, which say what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from llama_layers.errors import ConfigError, shown

# Tables are made from a config alone, one entry for each layer and each pair of channels: a
# malformed file must not fill the memory. Published models have up to 126 layers and heads of 512.
_MOST = {"num_hidden_layers": 10_000, "head_dim": 65_536}
_MOST_OF_ANY = 2**53  # beyond it float64 does not hold every integer


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is a positive integer of a size that makes sense."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected a positive integer, got {shown(value)}")
    if value > (most := _MOST.get(name, _MOST_OF_ANY)):
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


def check_flag(name: str, value: Any) -> None:
    """Raise ConfigError unless a value is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {shown(value)}")


def check_name(what: str, name: Any, known: Collection[str]) -> None:
    """Raise ConfigError unless a value is one of some known names."""
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{what}: expected one of {', '.join(known)}, got {shown(name)}")
