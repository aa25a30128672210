"""Results as plain values, for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def plain(value: object) -> Any:
    """Turn dataclasses into dicts, tuples into lists, NaN and Inf into None, which JSON lacks."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(found: Any, headline: object) -> dict[str, Any]:
    """Return a report as plain JSON values: the verdict first, then each result as its own."""
    return {
        "verdict": found.verdict,
        "agrees": found.agrees,
        "exit_status": found.exit_status,
        "headline": str(headline),
        "first": None if found.first is None else found.first.to_json(),
        **plain(found),
        "results": [result.to_json() for result in found.results],
    }
