"""Mistakes in layouts of heads, in kernels of attention and in the slots of a cache."""

from __future__ import annotations

import numpy as np

from tests.support.mistakes.mistake import (
    ATTENTION,
    K_ROPE,
    PLACES,
    K,
    Mistake,
    Q,
)
from tests.support.ported import COUNT, causal

_WEIGHT = np.linspace(0.5, 2.0, 8)


def _arrays(p):
    return [array.copy() for array in p.qkv]


def _unit(x, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def _still_head(p):
    y = p.right.copy()
    y[:, :, 1] = p.unturned[:, :, 1]
    return y


def _normed_before_rope(p):
    return p.turned(_unit(p.unturned, p.config.rms_norm_eps) * _WEIGHT)


def _with_zeros(number):
    """So many keys and values of zeros that each query sees."""

    def wrong(p):
        q, k, v = _arrays(p)
        most = max(number(s) for s in PLACES)
        k, v = (np.pad(y, ((0, 0), (0, most), (0, 0), (0, 0))) for y in (k, v))
        y = np.zeros(q.shape)
        for s in PLACES:
            seen = np.concatenate([p.allowed[s], np.arange(most) < number(s)])
            y[:, s : s + 1] = p.attended(q[:, s : s + 1], k, v, seen[None])
        return y

    return wrong


def _values_rolled(p):
    q, k, v = _arrays(p)
    return p.attended(q, k, np.roll(v, 1, axis=2))


def _page(slots, tokens, fields="kv"):
    """Some slots hold other tokens."""

    def wrong(p):
        q, *kv = _arrays(p)
        for name, array in zip("kv", kv, strict=True):
            if name in fields:
                array[:, slots] = array[:, tokens]
        return p.attended(q, *kv)

    return wrong


def _slot_of_another_sequence(p):
    q, *kv = _arrays(p)
    for array in kv:
        array[1, 4:8] = array[0, 4:8]
    return p.attended(q, *kv)


def _empty_slot(p):
    q, *kv = _arrays(p)
    for array in kv:
        array[:, 3] = 0
    return p.attended(q, *kv)


def _page_not_read(p):
    allowed = p.allowed.copy()
    allowed[8:, 4:8] = False
    return p.attended(*_arrays(p), allowed)


def _page_twice(p):
    """The pages are read in turn, the second one once more."""
    q, k, v = _arrays(p)
    k, v = (np.concatenate([y, y[:, 4:8]], axis=1) for y in (k, v))
    seen = p.allowed
    return p.attended(q, k, v, np.concatenate([seen, seen[:, 4:8]], axis=1))


def _padded_at_the_end(p):
    allowed = np.stack([causal(COUNT)] * 2)
    allowed[1, :, -4:] = False
    return p.attended(*_arrays(p), allowed)


MISTAKES = [
    Mistake("padding at the other end", ATTENTION, _padded_at_the_end, padded=True),
    Mistake("RoPE missing on a head", K_ROPE, _still_head),
    Mistake(
        "heads normalised",
        Q,
        lambda p: _unit(p.right.reshape(2, COUNT, 4, 8), p.config.rms_norm_eps) * _WEIGHT,
    ),
    Mistake(
        "heads normalised",
        K,
        lambda p: _unit(p.right.reshape(2, COUNT, 2, 8), p.config.rms_norm_eps),
    ),
    Mistake("heads normalised", Q, lambda p: _unit(p.right, p.config.rms_norm_eps)),
    Mistake("heads normalised", K_ROPE, _normed_before_rope),
    Mistake("empty keys counted", ATTENTION, _with_zeros(lambda s: 2)),
    Mistake("empty keys counted", ATTENTION, _with_zeros(lambda s: 31 - s)),
    Mistake("empty keys counted", ATTENTION, _with_zeros(lambda s: -(s + 1) % 8)),
    Mistake("values of other heads", ATTENTION, _values_rolled, "mha"),
    Mistake("another page of the cache", ATTENTION, _page(slice(4, 8), slice(0, 4))),
    Mistake("another page of the cache", ATTENTION, _page(slice(5, 6), slice(2, 3))),
    Mistake("another page of the cache", ATTENTION, _page(slice(4, 8), slice(8, 12), "v")),
    Mistake("another page of the cache", ATTENTION, _slot_of_another_sequence),
    Mistake("another page of the cache", ATTENTION, _empty_slot),
    Mistake("another page of the cache", ATTENTION, _page_not_read),
    Mistake("another page of the cache", ATTENTION, _page_twice),
]
