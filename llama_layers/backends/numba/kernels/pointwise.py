"""Norm, RoPE and the gate, in steps that LLVM vectorises.

The functions that end in ``_part`` compute the share of one of several threads.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from llama_layers.backends.numba.kernels.jit import compiled, inlined, reordering_sums
from llama_layers.backends.numba.kernels.llvm import pointer


@inlined
def exp(x):
    """Give e**x for x <= 0, or NaN, to about one unit in the last place, in steps that vectorise.

    With n = x / ln 2 rounded and r = x - n ln 2, of at most 0.35, it is 2**n times the first terms
    of e**r; r**8 / 8! is less than a tenth of a unit. The first part of ln 2 has 9 bits, so that n
    times it is exact, and 2**n is multiplied in two parts, since it may be subnormal.
    """
    bounded = x if x > np.float32(-104) else np.float32(-104)  # half the smallest number and less
    n = np.rint(bounded * np.float32(1.4426950408889634))
    r = bounded - n * np.float32(0.693359375) + n * np.float32(2.1219444005469057e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    p = p * (r * r) + r + np.float32(1)
    whole = np.int32(n)
    half = whole >> np.int32(1)
    low = np.int32((half + np.int32(127)) << np.int32(23)).view(np.float32)
    high = np.int32((whole - half + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * low * high if x == x else x


@reordering_sums
def _sum_of_squares(x):
    total = np.float32(0)
    for value in x:
        total += value * value
    return total


@compiled
def norm(x, weight, eps, y):
    """RMSNorm of each row."""
    for token in range(x.shape[0]):
        mean = _sum_of_squares(x[token]) / np.float32(x.shape[1])
        root = np.sqrt(mean + eps)
        for i in range(x.shape[1]):
            y[token, i] = weight[i] * (x[token, i] / root)


@compiled
def rotate(x, cos, sin, y):
    """RoPE of one head, whose pairs are i and i + D/2."""
    half = cos.shape[0]
    for i in range(half):
        a, b = x[i], x[half + i]
        y[i] = a * cos[i] - b * sin[i]
        y[half + i] = b * cos[i] + a * sin[i]


@compiled
def gate(x, up, y):
    """Give silu(x) * up of some numbers."""
    for i in range(x.shape[0]):
        g = x[i]
        decay = exp(-abs(g))
        numerator = np.float32(1) if g >= 0 else decay
        y[i] = g * (numerator / (np.float32(1) + decay)) * up[i]


@compiled
def _part(count, thread, threads):
    return count * thread // threads, count * (thread + 1) // threads


@compiled
def norm_part(thread, threads, x, weight, eps, y):
    """A thread's rows of RMSNorm, x and y [M, H]."""
    start, stop = _part(x.shape[0], thread, threads)
    norm(x[start:stop], weight, eps, y[start:stop])


@compiled
def gate_part(thread, threads, x, up, y):
    """A thread's numbers of the gate."""
    start, stop = _part(x.shape[0], thread, threads)
    gate(x[start:stop], up[start:stop], y[start:stop])


@compiled
def rotate_part(thread, threads, x, steps, cos, sin, y):
    """A thread's heads of RoPE: from the address x, in steps of bytes, to y [B, S, heads, D].

    The angles [1 or B, S, D/2] are the same for all sequences, or each has its own.
    """
    batch, seq, heads, width = y.shape
    start, stop = _part(batch * seq * heads, thread, threads)
    for unit in range(start, stop):
        b, s, h = unit // (seq * heads), unit // heads % seq, unit % heads
        at = x + b * steps[0] + s * steps[1] + h * steps[2]
        own = b % cos.shape[0]
        rotate(carray(pointer(at), (width,), np.float32), cos[own, s], sin[own, s], y[b, s, h])
