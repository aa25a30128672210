"""Ways in which files go wrong: values of the wrong kind, damaged text, damaged bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

_DEEP = object()
_STRANGE = [
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0,
    1e-300, 1e300, float("nan"), float("inf"), "", "x", "1e-05", "32", "\x1b[2J\n", "x" * 5000,
    "\ud800", "../../etc/passwd", [], [[]], {}, {"": None}, [1, "a", None], ["a", ["b"]],
    {"content": 5}, {"type": "linear"}, _DEEP,
]  # fmt: skip


def one_of(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    """One of some values, as it is: NumPy's own choice would make an array of them."""
    return values[int(rng.integers(len(values)))]


def strange(rng: np.random.Generator) -> Any:
    """A JSON value that few places expect."""
    value = one_of(rng, _STRANGE)
    if value is _DEEP:
        for _ in range(500):
            value = [value if isinstance(value, list) else 1]
    return value


def mutated_value(rng: np.random.Generator, value: Any) -> Any:
    """A copy of a JSON value with one place changed: replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = one_of(rng, list(value))
        kind = rng.random()
        if kind < 0.6:
            return {**value, key: mutated_value(rng, value[key])}
        if kind < 0.75:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.85:
            other = one_of(rng, list(value))
            return {**value, key: value[other]}
        return {(f"{k}x" if k == key else k): v for k, v in value.items()} | {"extra": strange(rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = int(rng.integers(len(value)))
        changed = mutated_value(rng, value[place])
        return [*value[:place], *([changed] * int(rng.integers(0, 3))), *value[place + 1 :]]
    return strange(rng)


def mutated_json(rng: np.random.Generator, value: Any) -> bytes:
    """The text of a JSON value with something wrong in its structure, or now and then its text."""
    for _ in range(one_of(rng, [1, 1, 1, 2, 3])):
        value = mutated_value(rng, value)
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and isinstance(value, dict) and value:  # a key twice
        key = one_of(rng, list(value))
        text = b"{" + json.dumps({key: strange(rng)}).encode()[1:-1] + b"," + text[1:]
    return mutated_bytes(rng, text) if rng.random() < 0.15 else text


def mutated_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    """Bytes with some flipped, cut off, repeated, inserted or set to an extreme."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            break
        place, kind = int(rng.integers(len(data))), rng.integers(6)
        size = int(rng.integers(1, 9))
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            data[place:place] = rng.bytes(size)
        elif kind == 4:
            data[place : place + 8] = one_of(rng, [0, 1, 255, 2**32, 2**63]).to_bytes(8, "little")
        else:
            data[place:place] = data[place : place + size]
    return bytes(data)
