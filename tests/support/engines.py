"""How engines compute: in what format, in what order, and rounded where.

All of it is correct, and differs in rounding only. Arrays are NumPy's; a format that NumPy has no
arithmetic for is rounded to after each step in the wider one.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}


NARROW = ("float16", "bfloat16")


def wide(dtype):
    """The format of sums over numbers of a format."""
    return np.float64 if dtype == "float64" else np.float32


def through(array, dtype):
    """Numbers rounded to a format, in the format they were in; as they are without one."""
    return array if dtype is None else array.astype(DTYPES[dtype]).astype(array.dtype)


def one_by_one(terms):
    """The sum over the last axis, from first to last, in the terms' own format."""
    total = np.zeros(terms.shape[:-1], terms.dtype)
    for i in range(terms.shape[-1]):
        total = total + terms[..., i]
    return total


def repeated(k, heads):
    """Keys or values [B, T, kv, D] as [B, heads, T, D], one for each query head."""
    return np.repeat(k, heads // k.shape[2], axis=2).transpose(0, 2, 1, 3)


def scores(q, k, scale, *, form="after", between=None, operands=None):
    """[B, heads, S, T], summed one by one, scaled before, after or half and half."""
    sums = wide(str(q.dtype))
    q, k = (through(a.astype(sums), operands) for a in (q, k))
    q, k = q.transpose(0, 2, 1, 3)[:, :, :, None, :], repeated(k, q.shape[2])[:, :, None]
    c = sums(scale)
    if form == "before":
        return one_by_one(q * c * k)
    if form == "half":
        root = sums(np.sqrt(scale))
        return one_by_one((q * root) * (k * root))
    return through(through(one_by_one(q * k), between) * c, between)


def softmax(a, mask):
    """Over the keys that a mask [S, T] allows."""
    a = np.where(mask, a, -np.inf)
    largest = a.max(axis=-1, keepdims=True)
    e = np.exp(a - np.where(largest == -np.inf, 0, largest))
    total = one_by_one(e)[..., None]
    return e / np.where(total == 0, 1, total)


def eager(q, k, v, mask, scale, *, between=None, probabilities=None):
    """Attention in steps: transformers rounds scores and probabilities to the dtype."""
    p = through(softmax(scores(q, k, scale, between=between), mask), probabilities)
    terms = p[..., None, :] * repeated(v, q.shape[2]).astype(p.dtype).swapaxes(2, 3)[:, :, None]
    return one_by_one(terms).transpose(0, 2, 1, 3).astype(q.dtype)


def online(q, k, v, mask, scale, *, block, probabilities=None, base2=False):
    """Attention block by block of keys, rescaling what it has (T. Dao et al., 2022)."""
    a = scores(q, k, scale * np.log2(np.e) if base2 else scale)
    exp = np.exp2 if base2 else np.exp
    a, values = np.where(mask, a, -np.inf), repeated(v, q.shape[2]).astype(a.dtype)
    largest = np.full(a.shape[:-1], -np.inf, a.dtype)
    total, y = np.zeros_like(largest), np.zeros((*a.shape[:-1], v.shape[3]), a.dtype)
    for start in range(0, a.shape[-1], block):
        part = a[..., start : start + block]
        above = np.maximum(largest, part.max(axis=-1))
        finite = np.where(above == -np.inf, 0, above)
        rescale = exp(largest - finite)
        e = exp(part - finite[..., None])
        total = total * rescale + one_by_one(e)
        weights = through(e, probabilities)[..., None, :]
        terms = weights * values[:, :, None, start : start + block].swapaxes(3, 4)
        y = y * rescale[..., None] + one_by_one(terms)
        largest = above
    inverse = 1 / np.where(total == 0, 1, total)
    return (y * inverse[..., None]).transpose(0, 2, 1, 3).astype(q.dtype)


def phases_in_float32(positions, config):
    """inv_freq and its products with positions in float32, as transformers has them."""
    exponents = np.arange(0, config.head_dim, 2).astype(np.float32) / np.float32(config.head_dim)
    inv_freq = np.float32(1) / np.float32(config.rope_theta) ** exponents
    return positions.astype(np.float32)[:, None] * inv_freq


def phases_one_after_the_other(positions, config):
    """Each phase the one before times a power, as llama.cpp has them."""
    step = np.float32(config.rope_theta) ** np.float32(-2 / config.head_dim)
    phase, found = positions.astype(np.float32), []
    for _ in range(config.head_dim // 2):
        found.append(phase)
        phase = phase * step
    return np.stack(found, axis=-1)


def rope(x, phases, *, table=None, arithmetic=None):
    """Channels i and i + D / 2 turned by phases [S, D / 2]; the table in float32, or rounded."""
    cos, sin = (through(f(phases).astype(np.float32), table)[:, None] for f in (np.cos, np.sin))
    a, b = np.split(x.astype(np.float32), 2, axis=-1)
    ac, bs, bc, as_ = (through(t, arithmetic) for t in (a * cos, b * sin, b * cos, a * sin))
    y = np.concatenate([through(ac - bs, arithmetic), through(bc + as_, arithmetic)], axis=-1)
    return y.astype(x.dtype)


def rms_norm(x, weight, eps, *, normed=None):
    """The row rounded before it multiplies with the weight, as in transformers."""
    x32 = x.astype(np.float32)
    n = np.float32(x.shape[-1])
    mean = one_by_one(x32 * x32)[..., None] / n
    row = through(x32 * (1 / np.sqrt(mean + np.float32(eps))), normed)
    return (row * weight.astype(np.float32)).astype(x.dtype)


def gate_forms(g):
    """silu(g) in the ways that engines compute it; the exponential of a large -g overflows."""
    half = g.dtype.type(0.5)
    one = g.dtype.type(1)
    with np.errstate(over="ignore"):
        yield "quotient", g / (one + np.exp(-g))
        yield "sigmoid", g * (one / (one + np.exp(-g)))
    decay = np.exp(-np.abs(g))
    yield "either sign", g * (np.where(g >= 0, one, decay) / (one + decay))
    yield "tanh", half * g * (one + np.tanh(g / 2))
    yield "logistic by tanh", g * (half + half * np.tanh(half * g))


def gelu_forms(g):
    """gelu(g) as PyTorch, kernels with exponentials and llama.cpp compute it."""
    of = g.dtype.type
    one, half, root, cube = of(1), of(0.5), of(np.sqrt(2 / np.pi)), of(0.044715)
    with np.errstate(over="ignore"):
        z = root * (g + cube * g * g * g)
        yield "tanh", half * g * (one + np.tanh(z))
        yield "sigmoid", g * (one / (one + np.exp(-2 * z)))
        yield "factored", half * g * (one + np.tanh(root * g * (one + cube * g * g)))
