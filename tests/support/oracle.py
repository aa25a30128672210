"""The maths again, in naive loops over Python floats, and in exact rational numbers.

None of it is taken from the package, so that it can be held against it.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np

from llama_layers.arrays.transfer import to_numpy


def linear(x, weight, bias=None):
    """y[..., o] = sum over i of weight[o, i] x[..., i], plus bias[o]."""
    outputs, inputs = weight.shape
    y = np.zeros((*x.shape[:-1], outputs))
    w = weight.astype(np.float64).tolist()
    for row in np.ndindex(*x.shape[:-1]):
        numbers = x[row].astype(np.float64).tolist()
        for o in range(outputs):
            total = 0.0
            for i in range(inputs):
                total += w[o][i] * numbers[i]
            y[(*row, o)] = total if bias is None else total + float(bias[o])
    return y


def qkv(x, wq, wk, wv, head_dim, biases=(None, None, None)):
    """Each projection by itself, element by element into [batch, seq, head, channel]."""
    results = []
    for weight, bias in zip((wq, wk, wv), biases, strict=True):
        flat = linear(x, weight, bias)
        batch, seq, outputs = flat.shape
        split = np.zeros((batch, seq, outputs // head_dim, head_dim))
        for b, s, h, d in product(*map(range, split.shape)):
            split[b, s, h, d] = flat[b, s, h * head_dim + d]
        results.append(split)
    return results


def rms_norm(x, weight, eps):
    """y[..., i] = weight[i] x[..., i] / sqrt(mean of the squares + eps)."""
    y = np.zeros(x.shape)
    w = weight.astype(np.float64).tolist()
    for row in np.ndindex(*x.shape[:-1]):
        numbers = x[row].astype(np.float64).tolist()
        mean_square = sum(number * number for number in numbers) / len(numbers)
        root = math.sqrt(mean_square + eps)
        for i, number in enumerate(numbers):
            y[(*row, i)] = w[i] * (number / root)
    return y


def exact(values):
    """An array's numbers as fractions, in an array of objects."""
    fractions = np.empty(values.shape, object)
    for place in np.ndindex(*values.shape):
        fractions[place] = Fraction(float(values[place]))
    return fractions


def exact_linear(x, weight, bias=None):
    """`linear` without a rounding, and the sum of the magnitudes of its terms."""
    xs, ws = exact(x), exact(weight)
    y, magnitude = xs @ ws.T, abs(xs) @ abs(ws).T
    if bias is not None:
        y, magnitude = y + exact(bias), magnitude + abs(exact(bias))
    return y, magnitude


def exact_square_root(value, bits=200):
    """The root of a fraction, to a relative error below 2**-bits."""
    if value == 0:
        return Fraction(0)
    shift = 2 * max(0, bits + value.denominator.bit_length())
    return Fraction(math.isqrt((value.numerator << shift) // value.denominator), 1 << shift // 2)


def assert_apart_at_most(first, second, limit):
    """Two results of any library, no element further apart than its limit."""
    a, b = (to_numpy(array).astype(np.float64) for array in (first, second))
    assert a.shape == b.shape
    assert (np.abs(a - b) <= limit).all(), f"{np.abs(a - b)} beyond {limit}"
