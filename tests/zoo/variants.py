"""Correct ports that compute each step in another way: none may fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tests.zoo.models import DECODED, Setting
from tests.zoo.numbers import bfloat16, float16
from tests.zoo.port import Port
from tests.zoo.registry import PLAIN, put


@dataclass(frozen=True)
class Variant:
    """A correct port, in one format, with what has to be declared about it."""

    name: str
    plant: Callable[[Port], None]
    dtype: str
    setting: Setting = PLAIN
    profile: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    dumped: str | None = None
    """The dtype that its arrays are written in, if that is wider."""


VARIANTS: list[Variant] = []
ALL = ("float32", "bfloat16", "float16")


def variant(method: str, dtypes: tuple[str, ...] = ALL, **numbers: Any) -> Callable[..., Any]:
    """Another way for a step, in some formats; `numbers` are further keywords of the body."""

    def record(body: Callable[..., Any]) -> Callable[..., Any]:
        said = "".join(f"_{value}" for value in numbers.values())
        step = partial(put, method, partial(body, **numbers))
        VARIANTS.extend(Variant(body.__name__ + said, step, dtype) for dtype in dtypes)
        return body

    return record


def setting(name: str, on: Setting, dtypes: tuple[str, ...] = ALL, **declared: Any) -> None:
    """The plain port on another model or prompt."""
    VARIANTS.extend(Variant(name, lambda port: None, d, on, **declared) for d in dtypes)


# Products.


@variant("multiply")
def reversed_sum(port, right, x, w, site):
    return right(x[..., ::-1], w[:, ::-1], site)


@variant("multiply")
def one_by_one(port, right, x, w, site):
    total = np.zeros((*x.shape[:-1], len(w)), port.work)
    for k in range(x.shape[-1]):
        total += x[..., k : k + 1] * w[:, k]
    return total


@variant("multiply")
def fused_multiply_add(port, right, x, w, site):
    total = np.zeros((*x.shape[:-1], len(w)), np.float32)
    for k in range(x.shape[-1]):
        total = (total + x[..., k : k + 1].astype(np.float64) * w[:, k]).astype(np.float32)
    return total


@variant("multiply", size=2)
@variant("multiply", size=4)
@variant("multiply", size=8)
def split_k(port, right, x, w, site, size):
    return sum(right(x[..., i::size], w[:, i::size], site) for i in range(size))


@variant("multiply", size=16)
@variant("multiply", size=64)
def slabs(port, right, x, w, site, size):
    starts = range(0, x.shape[-1], size)
    return sum(right(x[..., i : i + size], w[:, i : i + size], site) for i in starts)


@variant("multiply")
def pairwise_sum(port, right, x, w, site):
    return (x[..., None, :] * w).sum(-1, dtype=port.work)


@variant("multiply", ("float32", "bfloat16"))
def exact_products(port, right, x, w, site):
    return (x.astype(np.float64) @ w.T.astype(np.float64)).astype(port.work)


@variant("multiply", ("float32", "bfloat16"))
def three_bfloat16_products(port, right, x, w, site):
    parts = []
    for a in (x, w):
        high = bfloat16(a)
        middle = bfloat16(a - high)
        parts.append((high, middle, bfloat16(a - high - middle)))
    (a, b, c), (d, e, f) = parts
    low = c @ d.T + b @ e.T + a @ f.T
    return low + (b @ d.T + a @ e.T) + a @ d.T


@variant("multiply")
def fused_weights(port, right, x, w, site):
    """One product for queries, keys and values, and one for gate and up."""
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if site.endswith(parts):
            stem = site.rpartition(".")[0]
            all_w = [port.w[f"{stem}.{part}.weight"] for part in parts]
            ends = np.cumsum([len(one) for one in all_w])[:-1]
            whole = np.split(x @ np.concatenate(all_w).T, ends, -1)
            return whole[[site.endswith(part) for part in parts].index(True)]
    return right(x, w, site)


@variant("multiply")
def by_token(port, right, x, w, site):
    return np.stack([w @ token for token in x.reshape(-1, x.shape[-1])]).reshape(
        *x.shape[:-1], len(w)
    )


# Norms.


@variant("norm")
def reciprocal_root(port, right, x, site):
    root = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + port.work(port.eps))
    return port.round(x * root * port.w[f"{site}.weight"])


@variant("norm")
def root_by_newton(port, right, x, site):
    mean = (x * x).mean(-1, keepdims=True) + np.float32(port.eps)
    bits = np.uint32(0x5F3759DF) - (mean.astype(np.float32).view(np.uint32) >> np.uint32(1))
    root = bits.view(np.float32)
    for _ in range(4):
        root = root * (np.float32(1.5) - np.float32(0.5) * mean * root * root)
    return port.round(x * root * port.w[f"{site}.weight"])


@variant("norm")
def weight_first(port, right, x, site):
    root = np.sqrt((x * x).mean(-1, keepdims=True) + port.work(port.eps))
    return port.round(x * port.w[f"{site}.weight"] / root)


@variant("norm")
def squares_one_by_one(port, right, x, site):
    total = np.zeros_like(x[..., :1])
    for channel in range(x.shape[-1]):
        total += x[..., channel : channel + 1] ** 2
    root = np.sqrt(total / x.shape[-1] + port.work(port.eps))
    return port.round(x / root * port.w[f"{site}.weight"])


@variant("norm")
def norm_scaled_by_largest(port, right, x, site):
    top = np.abs(x).max(-1, keepdims=True)
    y = x / top
    root = np.sqrt((y * y).mean(-1, keepdims=True) + port.work(port.eps) / top**2)
    return port.round(y / root * port.w[f"{site}.weight"])


# RoPE.


@variant("rotate")
def rotation_by_complex(port, right, x, at, site):
    cos, sin = port.table(at, site)
    a, b = np.split(x, 2, -1)
    turned = (a + 1j * b) * (cos + 1j * sin)
    return port.round(np.concatenate([turned.real, turned.imag], -1))


@variant("rotate")
def rotation_by_matrix(port, right, x, at, site):
    cos, sin = (np.concatenate([part, part], -1) for part in port.table(at, site))
    a, b = np.split(x, 2, -1)
    return port.round(x * cos + np.concatenate([-b, a], -1) * sin)


@variant("table")
def table_by_recurrence(port, right, at, site):
    turn = np.exp(1j * port.frequencies())
    rows = np.cumprod(np.broadcast_to(turn, (at.max() + 1, len(turn))), 0) / turn
    found = rows[at][:, :, None]
    return found.real.astype(port.work), found.imag.astype(port.work)


@variant("table")
def float32_phases(port, right, at, site):
    angles = (at[..., None].astype(np.float32) * port.frequencies().astype(np.float32))[:, :, None]
    return np.cos(angles), np.sin(angles)


@variant("rotate")
def rotation_of_pairs(port, right, x, at, site):
    cos, sin = port.table(at, site)
    out = np.empty_like(x)
    half = x.shape[-1] // 2
    for i in range(half):
        c, s = cos[..., i], sin[..., i]
        out[..., i] = x[..., i] * c - x[..., i + half] * s
        out[..., i + half] = x[..., i] * s + x[..., i + half] * c
    return port.round(out)


# Attention.


@variant("attention", block=1)
@variant("attention", block=4)
@variant("attention", block=8)
@variant("attention", block=16)
@variant("attention", ("float32", "bfloat16"), block=7)
def flash(port, right, q, k, v, layer, past, block):
    scores = np.where(port.mask(q.shape[1], past, layer), port.scores(q, k, layer), -1e30)
    total = weighted = 0
    top = np.full((*scores.shape[:-1], 1), -1e30, port.work)
    for first in range(0, scores.shape[-1], block):
        part = scores[..., first : first + block]
        larger = np.maximum(top, part.max(-1, keepdims=True))
        powers, fade = np.exp(part - larger), np.exp(top - larger)
        total = total * fade + powers.sum(-1, keepdims=True)
        weighted = weighted * fade.swapaxes(1, 2)
        weighted = weighted + port.weigh(powers, v[:, first : first + block], layer)
        top = larger
    return weighted / total.swapaxes(1, 2)


@variant("attention", ("float32", "bfloat16"), splits=2)
@variant("attention", splits=3)
def split_keys(port, right, q, k, v, layer, past, splits):
    scores = np.where(port.mask(q.shape[1], past, layer), port.scores(q, k, layer), -1e30)
    outs, logs = [], []
    for part in np.array_split(np.arange(k.shape[1]), splits):
        some = scores[..., part]
        top = some.max(-1, keepdims=True)
        powers = np.exp(some - top)
        total = powers.sum(-1, keepdims=True)
        outs.append(port.weigh(powers / total, v[:, part], layer))
        logs.append(top + np.log(total))
    shares = np.exp(np.concatenate(logs, -1) - np.max(logs, 0))
    shares = shares / shares.sum(-1, keepdims=True)
    parts = zip(outs, np.moveaxis(shares, -1, 0), strict=True)
    return sum(out * share[..., None].swapaxes(1, 2) for out, share in parts)


@variant("softmax")
def powers_of_two(port, right, scores, seen):
    masked = np.where(seen, scores * port.work(np.log2(np.e)), -np.inf)
    powers = np.exp2(masked - masked.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@variant("softmax")
def no_maximum(port, right, scores, seen):
    powers = np.where(seen, np.exp(scores), 0)
    return powers / powers.sum(-1, keepdims=True)


@variant("softmax")
def mask_of_large_number(port, right, scores, seen):
    return right(scores + np.where(seen, 0, port.work(-30000)), np.ones_like(seen))


@variant("softmax")
def softmax_by_log(port, right, scores, seen):
    masked = np.where(seen, scores, -np.inf)
    top = masked.max(-1, keepdims=True)
    return np.exp(masked - (top + np.log(np.exp(masked - top).sum(-1, keepdims=True))))


@variant("scores")
def queries_scaled(port, right, q, k, layer):
    return np.einsum("bqhd,bkhd->bhqk", q * port.work(port.scale), port.spread(k))


@variant("weigh")
def values_from_last(port, right, p, v, layer):
    return right(p[..., ::-1], v[:, ::-1], layer)


@variant("attention")
def divided_at_the_end(port, right, q, k, v, layer, past):
    scores = np.where(port.mask(q.shape[1], past, layer), port.scores(q, k, layer), -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return port.weigh(powers, v, layer) / powers.sum(-1, keepdims=True).swapaxes(1, 2)


# The MLP, and everywhere.


@variant("activate")
def silu_by_tanh(port, right, x):
    return port.work(0.5) * x * (1 + np.tanh(port.work(0.5) * x))


@variant("activate")
def silu_by_powers_of_two(port, right, x):
    return x / (1 + np.exp2(-x * port.work(np.log2(np.e))))


@variant("activate")
def silu_by_reciprocal(port, right, x):
    return x * (1 / (1 + np.exp(-x)))


@variant("gate")
def product_first(port, right, gate, up, site):
    return port.round(gate * up / (1 + np.exp(-gate)))


@variant("round")
def subnormals_flushed(port, right, x):
    """Subnormal numbers of float32 are zero, as with -ffast-math."""
    return right(np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x))


@variant("softmax")
def fast_math_softmax(port, right, scores, seen):
    """Multiplies by a reciprocal, from exponentials whose subnormal numbers are zero."""
    masked = np.where(seen, scores, -np.inf)
    powers = np.exp(masked - masked.max(-1, keepdims=True))
    powers = np.where(powers < np.finfo(np.float32).tiny, 0, powers)
    return powers * (1 / powers.sum(-1, keepdims=True))


# Settings, and what has to be declared.

setting("whole", PLAIN, (*ALL, "float64"))
setting("chunks", Setting(chunks=(10, 10, 4)))
setting("decoding", Setting(chunks=DECODED))
setting("left_padding", Setting(padding=5), (*ALL, "float64"))
setting("padding_and_decoding", Setting(padding=5, chunks=DECODED))
setting("late_positions", Setting(start=1000))
for _model in ("llama3", "linear", "yarn", "bias", "window", "tied", "wide_heads", "outlier"):
    setting(_model, Setting(_model), ("float32", "bfloat16"))
setting("deep", Setting("deep"), ("bfloat16",))
setting("one_token", Setting(count=1))
setting("written_as_float32", PLAIN, ("bfloat16", "float16"), dumped="float32")


def _ranks(port, right, x, w, site, ranks, reduce):
    """Partial sums of ranks, rounded and added in the format of the reduce."""
    if not site.endswith(("o_proj", "down_proj")):
        return right(x, w, site)
    narrow = {"float32": lambda a: a, "bfloat16": bfloat16}[reduce]
    parts = np.array_split(np.arange(x.shape[-1]), ranks)
    total = narrow(right(x[..., parts[0]], w[:, parts[0]], site))
    for part in parts[1:]:
        total = narrow(total + narrow(right(x[..., part], w[:, part], site)))
    return total


for _dtype, _reduce in (("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2):
    for _count in (2, 4):
        _said = f"tensor parallel, {_count} ranks, {_reduce} reduce"
        _body = partial(_ranks, ranks=_count, reduce=_reduce)
        VARIANTS.append(
            Variant(
                f"{_count}_ranks_{_reduce}", partial(put, "multiply", _body), _dtype, profile=_said
            )
        )


def _float16_cache(port, right, q, k, v, layer, past):
    return right(float16(q), float16(k), float16(v), layer, past)


for _name, _at in (("float16_cache", PLAIN), ("float16_cache_decoding", Setting(chunks=DECODED))):
    _plant = partial(put, "attention", _float16_cache)
    VARIANTS.append(Variant(_name, _plant, "float32", _at, profile="llama.cpp"))
