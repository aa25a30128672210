"""Quantised weights and activations."""

from __future__ import annotations

import numpy as np

from tests.zoo.mistakes.weights import every
from tests.zoo.numbers import by_blocks, by_rows, fp8, over_blocks
from tests.zoo.registry import edit, step

NF4 = np.array([
    -1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1,
])  # fmt: skip


@edit("0.q_proj")
def weights_int8_rows(port):
    every(port, "_proj.weight", lambda w: by_rows(w, 127))


@edit("0.down_proj")
def weights_int4_blocks(port):
    every(port, "down_proj.weight", lambda w: by_blocks(w, 7, 32))


@edit("0.gate_proj")
def weights_fp8(port):
    every(port, ("gate_proj.weight", "up_proj.weight", "down_proj.weight"), fp8)


@edit("0.q_proj")
def weights_nf4(port):
    def nearest(blocks):
        scale = np.abs(blocks).max(-1, keepdims=True)
        return NF4[np.abs(blocks[..., None] / scale[..., None] - NF4).argmin(-1)] * scale

    attention = tuple(f"{part}_proj.weight" for part in "qkvo")
    every(port, attention, lambda w: over_blocks(w, 64, nearest))


@step("multiply", "0.gate_proj")
def activations_fp8(port, right, x, w, site):
    return right(fp8(x) if ".mlp." in site else x, w, site)


@step("multiply", "0.q_proj")
def activations_int8_blocks(port, right, x, w, site):
    return right(by_blocks(x, 127, 32), w, site)


@step("multiply", "0.q_proj")
def activations_int8_token(port, right, x, w, site):
    return right(by_rows(x, 127), w, site)


def _asymmetric(blocks, change):
    """Four bits with a scale and a zero point, changed before the numbers are put together."""
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    scale = np.maximum((high - low) / 15, 1e-8)
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(blocks / scale) + zero, 0, 15)
    q, scale, zero = change(q, scale, zero)
    return (q - zero) * scale


@edit("0.q_proj")
def zero_point_off_by_one(port):
    def late(q, scale, zero):
        return q, scale, zero + 1

    every(port, "q_proj.weight", lambda w: over_blocks(w, 32, lambda b: _asymmetric(b, late)))


@edit("0.up_proj")
def scales_of_next_block(port):
    def rolled(blocks):
        scale = np.abs(blocks).max(-1, keepdims=True) / 7
        return np.rint(blocks / scale) * np.roll(scale, -1, -2)

    every(port, "up_proj.weight", lambda w: over_blocks(w, 32, rolled))


@edit("0.k_proj")
def nibbles_swapped(port):
    every(port, "k_proj.weight", lambda w: over_blocks(w, 32, lambda b: np.roll(b, 16, -1)))


@edit("0.v_proj")
def minimum_added(port):
    def wrong(blocks):
        low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
        scale = (high - low) / 15
        return np.rint((blocks - low) / scale) * scale - low

    every(port, "v_proj.weight", lambda w: over_blocks(w, 32, wrong))


@edit("0.down_proj")
def act_order_ignored(port):
    order = np.random.default_rng(2).permutation(168 // 8)
    columns = (order[:, None] * 8 + np.arange(8)).ravel()
    every(port, "down_proj.weight", lambda w: w[:, columns])


@step("multiply", "0.gate_proj")
def sums_of_int8_saturate(port, right, x, w, site):
    if not site.endswith("gate_proj"):
        return right(x, w, site)
    a, b = np.abs(x).max() / 255, np.abs(w).max(-1, keepdims=True) / 127
    q = np.rint(x / a)[..., None, :] * np.rint(w / b)
    pairs = np.clip(q.reshape(*q.shape[:-1], -1, 2).sum(-1), -8192, 8191)
    return (pairs.sum(-1) * a * b[:, 0]).astype(port.work)
