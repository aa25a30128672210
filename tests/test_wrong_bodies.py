"""Bodies of NumPy with planted bugs, each in some cases only: all are caught and bypassed."""

from __future__ import annotations

import numpy as np
import pytest

from llama_layers.backends import machine
from llama_layers.backends.numpy import BODIES
from llama_layers.backends.trust import settled
from llama_layers.layers.mask import Mask
from llama_layers.testing import assert_same_bits
from tests.support.watched_bodies import (
    BFLOAT16,
    DEFINITIONS,
    inputs,
    one_warning,
    only_for,
    planted,
    shuffled,
    spoiled,
    without_nan,
    without_tail,
)


def changed_input(y, xp, x, *_):
    x[...] = 0
    return y


def seeing_what_is_hidden(y, xp, q, k, v, mask, scale):
    """The rows that see nothing get the mean of all values."""
    empty = (y == 0).all(axis=(2, 3))
    y[empty] = v.astype(np.float32).mean()
    return y


def unmasked(windows, padding):
    def change(y, xp, q, k, v, mask, scale):
        if not isinstance(mask, Mask):
            return y
        window = None if windows else mask.window
        keep = None if padding else mask.keep
        changed = Mask(mask.queries, mask.keys, window, keep)
        return BODIES["attend"](xp, q, k, v, changed, scale)

    return change


def first_of_all(y, xp, q, k, v, mask, scale):
    """The padding of the first sequence for all of them."""
    if not isinstance(mask, Mask) or mask.keep is None:
        return y
    keep = np.repeat(mask.keep[:1], len(q), axis=0)
    return BODIES["attend"](xp, q, k, v, Mask(mask.queries, mask.keys, mask.window, keep), scale)


def another_layout(y, xp, x, cos, sin, layout):
    return BODIES["rotate"](xp, x, cos, sin, "half")


def angles_of_the_first(y, xp, x, cos, sin, layout):
    if cos.ndim == 3:
        cos, sin = cos[:1], sin[:1]
    return BODIES["rotate"](xp, x, cos, sin, layout)


def rounded_parts(y, xp, x, weight, bias):
    """Halves of a sum in 16 bits before they are added."""
    half = x.shape[1] // 2
    if x.dtype != BFLOAT16:
        return y
    parts = (
        BODIES["linear_2d"](xp, x[:, part], weight[:, part], None)
        for part in (np.s_[:half], np.s_[half:])
    )
    total = sum(part.astype(np.float32) for part in parts)
    return (total if bias is None else total + bias.astype(np.float32)).astype(x.dtype)


def without_bias(y, xp, x, weight, bias):
    return BODIES["linear_2d"](xp, x, weight, None) if x.dtype == np.float16 else y


def without_last_row(y, xp, x, weight, bias):
    """Of a number of rows that is no multiple of four."""
    if len(weight) % 4:
        y[:, -1] = 0
    return y


def many_tokens(y, xp, x, weight, bias):
    y[16:17] += 1
    return y


PLANTS = [
    ("activations", "rounded", lambda y, *_: y.astype(np.float16).astype(y.dtype)),
    ("activations", "as stored", lambda y, xp, x: x),
    ("normalise", "tails", without_tail),
    ("normalise", "bfloat16", only_for(BFLOAT16, lambda y: y * y.dtype.type(1.02))),
    ("normalise", "float64 in float32", lambda y, *_: y.astype(np.float32).astype(y.dtype)),
    ("normalise", "NaN", without_nan),
    ("normalise", "its input", changed_input),
    ("normalise", "no eps", lambda y, xp, x, w, eps: BODIES["normalise"](xp, x, w, 0.0)),
    ("rotate", "another layout", another_layout),
    ("rotate", "angles of the first sequence", angles_of_the_first),
    ("rotate", "NaN", without_nan),
    ("rotate", "float16", only_for(np.float16, shuffled)),
    ("gate_with_silu", "tails", without_tail),
    ("gate_with_silu", "float32", only_for(np.float32, lambda y: y * np.float32(1 + 1e-5))),
    ("gate_with_silu", "NaN", without_nan),
    ("linear_2d", "bfloat16", rounded_parts),
    ("linear_2d", "bias in float16", without_bias),
    ("linear_2d", "last row", without_last_row),
    ("linear_2d", "many tokens", many_tokens),
    ("linear_2d", "NaN", without_nan),
    ("linear_2d", "transposed in memory", lambda y, *_: y.T),
    ("attend", "empty rows", seeing_what_is_hidden),
    ("attend", "windows", unmasked(True, False)),
    ("attend", "padding", unmasked(False, True)),
    ("attend", "padding of the first sequence", first_of_all),
    ("attend", "heads", lambda y, *_: np.roll(y, 1, axis=2)),
    ("attend", "scaled twice", lambda y, xp, *a: BODIES["attend"](xp, *a[:-1], a[-1] ** 2)),
    ("attend", "NaN", without_nan),
    ("attend", "float16", only_for(np.float16, lambda y: y * np.float16(1.01))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil"), [p[::2] for p in PLANTS], ids=[f"{n}: {what}" for n, what, _ in PLANTS]
)
@pytest.mark.usefixtures("watched")
def test_a_wrong_body_is_bypassed(name, spoil):
    arguments = inputs(name)
    before = [np.copy(a) for a in arguments if isinstance(a, np.ndarray)]
    wrong = spoiled(BODIES[name], spoil)
    warned = f"{name} by NumPy is not used on {machine.processor()}"
    with planted("numpy", "NumPy", name, wrong), one_warning(warned):
        found = [DEFINITIONS[name](np, *arguments) for _ in range(2)]
    for y in found:
        assert_same_bits(y, DEFINITIONS[name].__wrapped__(np, *arguments))
    for array, copy in zip(
        (a for a in arguments if isinstance(a, np.ndarray)), before, strict=True
    ):
        assert_same_bits(array, copy)
    assert settled == {wrong: False}
