"""Roundings that a user allows beyond those of a profile."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from llama_layers.arrays.dtypes import FLOATS
from llama_layers.errors import shown
from llama_layers.verify.profiles import CONTRACT, RoundingProfile


def allowing(profile: RoundingProfile, roundings: str) -> RoundingProfile:
    """A profile with more roundings, such as "cache=float16, scores"; a ValueError if unknown."""
    if not isinstance(roundings, str):
        raise TypeError(f"allow: expected a str, got {type(roundings).__name__}")
    pairs = [_allowed(one.strip()) for one in roundings.split(",")]
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError(f"allow: expected each rounding once, got {shown(roundings)}")
    said = ", ".join(
        f"{name}={value}" if value is not True else name for name, value in given.items()
    )
    return replace(
        profile, name=said if profile is CONTRACT else f"{profile.name}, {said}", **given
    )


def _allowed(one: str) -> tuple[str, Any]:
    """The field of a profile that a text such as "cache=float16" means, and its value."""
    name, equals, value = (part.strip() for part in one.partition("="))
    kinds = {step.name: str(step.type) for step in fields(RoundingProfile) if step.name != "name"}
    kind = kinds.get(name, "")
    if kind.startswith("bool") and not equals:
        return name, True
    if "str" in kind and value in FLOATS:
        return name, value
    try:
        if kind in ("int", "float"):
            return name, int(value) if kind == "int" else float(value)
    except ValueError:
        pass
    expected = {
        "bool": name,
        "bool | str": f"{name}, or one such as {name}=bfloat16",
        "str | None": f"a format, such as {name}=float16",
        "int": f"a number, such as {name}=2",
        "float": f"a number, such as {name}=2",
    }.get(kind)
    if expected is None:
        raise ValueError(
            f"allow: expected roundings such as 'cache=float16,scores', got {shown(one)}; the "
            f"names are {', '.join(kinds)}"
        )
    raise ValueError(f"allow: expected {expected}, got {shown(one)}")
