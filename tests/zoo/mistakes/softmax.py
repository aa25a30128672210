"""Softmax, in one go and in blocks, and the weighted sum."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from tests.zoo.numbers import bfloat16, float16
from tests.zoo.registry import step


def powers_of(scores, seen):
    """Exponentials of what is above the largest score."""
    masked = np.where(seen, scores, -np.inf)
    return np.exp(masked - masked.max(-1, keepdims=True))


@step("softmax", "0.attention")
def attention_sink(port, right, scores, seen):
    top = np.maximum(np.where(seen, scores, -np.inf).max(-1, keepdims=True), 0)
    powers = np.where(seen, np.exp(scores - top), 0)
    return powers / (powers.sum(-1, keepdims=True) + np.exp(-top))


@step("attention", "0.attention")
def running_maximum_unscaled(port, right, q, k, v, layer, past):
    scores, seen = port.scores(q, k, layer), port.mask(q.shape[1], past, layer)
    scores = np.where(seen, scores, -np.inf)
    total, weighted, top = 0, 0, np.full((*scores.shape[:-1], 1), -1e30, np.float32)
    for first in range(0, scores.shape[-1], 8):
        block = scores[..., first : first + 8]
        top = np.maximum(top, block.max(-1, keepdims=True))
        powers = np.exp(block - top)
        total = total + powers.sum(-1, keepdims=True)
        weighted = weighted + port.weigh(powers, v[:, first : first + 8], layer)
    return (weighted / total.swapaxes(1, 2)).astype(port.work)


@step("softmax", "0.attention")
def padded_keys_counted(port, right, scores, seen):
    extra = -scores.shape[-1] % 16
    shape = (*scores.shape[:-1], extra)
    scores = np.concatenate([scores, np.zeros(shape, scores.dtype)], -1)
    seen = np.concatenate([seen, np.ones((*seen.shape[:-1], extra), bool)], -1)
    return right(scores, seen)[..., :-extra]


@step("mask", "0.attention")
def last_block_dropped(port, right, count, past, layer):
    seen = right(count, past, layer)
    seen[..., 20:] = False
    return seen


def _splits(port, q, k, v, layer, past, ends):
    """The output and the log of the sum of exponentials of each range of keys."""
    scores, seen = port.scores(q, k, layer), port.mask(q.shape[1], past, layer)
    scores = np.where(seen, scores, -1e30)
    for first, last in pairwise(ends):
        part = scores[..., first:last]
        top = part.max(-1, keepdims=True)
        powers = np.exp(part - top)
        total = powers.sum(-1, keepdims=True)
        logs = np.where(top > -1e29, top + np.log(total), -1e30)
        yield port.weigh(powers / total, v[:, first:last], layer), logs


@step("attention", "0.attention")
def splits_averaged(port, right, q, k, v, layer, past):
    parts = list(_splits(port, q, k, v, layer, past, (0, 12, 24)))
    alone = (np.arange(q.shape[1]) < 12)[:, None, None]
    mean = (parts[0][0] + parts[1][0]) / 2
    return np.where(alone, parts[0][0], mean).astype(port.work)


def _joined(port, parts, base):
    logs = np.concatenate([log for _, log in parts], -1)
    shares = base ** (logs - logs.max(-1, keepdims=True))
    shares = shares / shares.sum(-1, keepdims=True)
    found = sum(out * shares[..., i : i + 1].swapaxes(1, 2) for i, (out, _) in enumerate(parts))
    return found.astype(port.work)


@step("attention", "0.attention")
def splits_base_two(port, right, q, k, v, layer, past):
    return _joined(port, list(_splits(port, q, k, v, layer, past, (0, 12, 24))), 2.0)


@step("attention", "0.attention")
def splits_drop_remainder(port, right, q, k, v, layer, past):
    size = k.shape[1] // 5
    ends = tuple(size * i for i in range(6))
    return _joined(port, list(_splits(port, q, k, v, layer, past, ends)), np.e)


@step("softmax", "0.attention")
def exponential_base_two(port, right, scores, seen):
    return right(scores * port.work(np.log(2)), seen)


@step("softmax", "0.attention")
def exponential_fast(port, right, scores, seen):
    masked = np.where(seen, scores, -np.inf)
    x = np.maximum(masked - masked.max(-1, keepdims=True), -80)
    bits = (12102203 * x.astype(np.float64) + 1064866805).astype(np.int32)
    powers = np.where(seen, bits.view(np.float32), 0)
    return powers / powers.sum(-1, keepdims=True)


@step("softmax", "0.attention")
def probabilities_float16(port, right, scores, seen):
    return float16(right(scores, seen))


@step("softmax", "0.attention")
def denominator_bfloat16(port, right, scores, seen):
    powers = powers_of(scores, seen)
    return powers / bfloat16(powers.sum(-1, keepdims=True))


@step("softmax", "0.attention")
def probabilities_dropout(port, right, scores, seen):
    p = right(scores, seen)
    kept = np.random.default_rng(5).random(p.shape) >= 0.1
    return p * kept / port.work(0.9)


@step("softmax", "0.attention")
def probabilities_unnormalised(port, right, scores, seen):
    return powers_of(scores, seen)


@step("softmax", "0.attention")
def top_eight_keys(port, right, scores, seen):
    masked = np.where(seen, scores, -np.inf)
    eighth = np.sort(masked, -1)[..., -8, None]
    return right(scores, seen & (masked >= eighth))


@step("weigh", "0.attention")
def values_late_by_one(port, right, p, v, layer):
    return right(p, np.roll(v, 1, 1), layer)
