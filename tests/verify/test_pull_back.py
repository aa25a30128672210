"""Sites that were not recorded, solved for from the outputs of layers, and diagnosed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llama_layers.verify import check
from tests.support.mistakes.mistake import (
    ACT,
    ATTENTION,
    DOWN,
    K_ROPE,
    OUT,
    Q_ROPE,
    UP,
    Mistake,
    V,
)
from tests.support.ported import COUNT, attended, causal, omega, run, turned

PLACES = np.arange(COUNT)
LATE = PLACES >= COUNT // 2


def _product(p, x, role):
    return x.astype(np.float64) @ p.weight(role).T


def _half_twice(p):
    return _product(p, p[ACT] * np.where(np.arange(48) < 24, 2, 1), DOWN)


def _reversed(p):
    return _product(p, p[ACT][..., ::-1], DOWN)


def _tail_of_zeros(p):
    return p.right * (np.arange(32) < 24)


def _channel_negative(p):
    return p.right * np.where(np.arange(48) == 7, -1, 1)


def _tile_repeated(p):
    y = p.right.copy()
    y[..., 16:24] = y[..., 8:16]
    return y


def _rows_of_zeros(p):
    return p.right * (np.arange(32) % 8 != 3)


def _attends(allowed=None, weights=None):
    def wrong(p):
        q, k, v = (p.heads(name) for name in (Q_ROPE, K_ROPE, V))
        return attended(q, k, v, causal(COUNT) if allowed is None else allowed, weights=weights)

    return wrong


def _of_largest(scores):
    kept = np.where(scores >= np.sort(scores, axis=-1)[..., -4, None], scores, -np.inf)
    e = np.exp(kept - kept.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _capped(scores):
    e = np.where(np.isfinite(scores), np.exp(1.3 * np.tanh(scores / 1.3)), 0)
    return e / e.sum(axis=-1, keepdims=True)


def _late_by_another_theta(p):
    x = p.heads("self_attn.q_proj")
    other = turned(x, np.outer(PLACES, omega(p.config, 10000.0)))
    return np.where(LATE[:, None, None], other, p.right)


MISTAKES = [
    Mistake("a part of the sum added twice", DOWN, _half_twice),
    Mistake("input channels in another order", DOWN, _reversed),
    Mistake("zeros", DOWN, _tail_of_zeros),
    Mistake("sign flipped", UP, _channel_negative),
    Mistake("outputs repeated", UP, _tile_repeated),
    Mistake("zeros", OUT, _rows_of_zeros),
    Mistake("other tokens seen", ATTENTION, _attends(causal(COUNT) & (PLACES > 0))),
    Mistake("only the largest scores", ATTENTION, _attends(weights=_of_largest)),
    Mistake("scores capped", ATTENTION, _attends(weights=_capped)),
    Mistake("another rope_theta", Q_ROPE, _late_by_another_theta),
]


# Other words for the same: an input of the next product that counts -1 times, and channels of a
# block that are not added.
THE_SAME = {"sign flipped": "input channels counted otherwise", "zeros": "block not added"}


def of_layers(mistake):
    trace, model = run(mistake)
    kept = {n: a for n, a in trace.arrays.items() if n.count(".") == 2 and ".layers." in n}
    return check(replace(trace, arrays=kept), model)


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(m, id=f"{m.name}, {m.role}", marks=[pytest.mark.slow] if i % 3 else [])
        for i, m in enumerate(MISTAKES)
    ],
)
def test_a_mistake_in_a_layer(mistake):
    report = of_layers(mistake)
    assert report.first.site.name == "model.layers.1"
    names = [explanation.name for explanation in report.first.explanations]
    assert {mistake.name, THE_SAME.get(mistake.name)} & {*names}
    for explanation in report.first.explanations:
        if explanation.name == mistake.name:
            assert explanation.detail.endswith(f" That is at {mistake.site}.")


@pytest.mark.slow
def test_noise_inside_is_not_explained():
    noise = np.random.default_rng(2).standard_normal((2, COUNT, 32)) / 10
    for role in (DOWN, OUT):
        report = of_layers(Mistake("noise", role, lambda p: p.right + noise))
        assert report.first.site.name == "model.layers.1"
        assert report.first.explanations == ()
