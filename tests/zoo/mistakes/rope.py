"""RoPE: its frequencies, its table, and the rotation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.zoo.models import DECODED, Setting
from tests.zoo.numbers import bfloat16, float16
from tests.zoo.registry import edit, step

LLAMA3, FAR = Setting("llama3"), Setting(start=1000)


@edit("0.q_rope")
def theta_default(port):
    port.theta = 10000.0


@step("llama3", "0.q_rope", LLAMA3)
def scaling_ignored(port, right, plain, s):
    return plain


@step("llama3", "0.q_rope", LLAMA3)
def scaling_factor_hard_coded(port, right, plain, s):
    return right(plain, replace(s, factor=8.0))


@step("llama3", "0.q_rope", LLAMA3)
def scaling_uniform(port, right, plain, s):
    return plain / s.factor


@step("llama3", "0.q_rope", LLAMA3)
def scaling_without_ramp(port, right, plain, s):
    turns = s.original_max_position_embeddings * plain / (2 * np.pi)
    return np.where(turns < s.high_freq_factor, plain / s.factor, plain)


@step("llama3", "0.q_rope", LLAMA3)
def scaling_ramp_reversed(port, right, plain, s):
    turns = s.original_max_position_embeddings * plain / (2 * np.pi)
    kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    kept = np.where((kept > 0) & (kept < 1), 1 - kept, np.clip(kept, 0, 1))
    return plain * kept + plain / s.factor * (1 - kept)


@step("llama3", "0.q_rope", LLAMA3)
def scaling_wrong_context(port, right, plain, s):
    return right(plain, replace(s, original_max_position_embeddings=2048))


@step("frequencies", "0.q_rope", Setting("linear"))
def linear_scaling_multiplies(port, right):
    return right() * port.config.rope_scaling.factor**2


@edit("0.q_rope", Setting("linear"))
def linear_scaling_by_base(port):
    factor, width = port.config.rope_scaling.factor, port.width
    base = port.theta * factor ** (width / (width - 2))
    port.frequencies = lambda: base ** (-np.arange(0, width, 2) / width)


@step("magnitude", "0.q_rope", Setting("yarn"))
def yarn_without_magnitude(port, right):
    return 1.0


@step("magnitude", "0.q_rope", Setting("yarn"))
def yarn_magnitude_squared(port, right):
    return right() ** 2


@step("yarn", "0.q_rope", Setting("yarn"))
def yarn_as_linear(port, right, plain, s):
    return plain / s.factor


@step("rotate", "0.q_rope", Setting("llama3", chunks=DECODED))
def decode_unscaled(port, right, x, at, site):
    scaled = port.llama3
    port.llama3 = (lambda plain, s: plain) if x.shape[1] == 1 else scaled
    found = right(x, at, site)
    port.llama3 = scaled
    return found


@step("rotate", "0.q_rope")
def rotate_half_without_minus(port, right, x, at, site):
    cos, sin = port.table(at, site)
    a, b = np.split(x, 2, -1)
    return port.round(np.concatenate([a * cos + b * sin, b * cos + a * sin], -1))


@step("rotate", "0.q_rope")
def rotated_other_way(port, right, x, at, site):
    return right(x, -at, site)


@step("rotate", "0.q_rope")
def rotated_twice(port, right, x, at, site):
    return right(right(x, at, site), at, site)


@step("rotate", "0.q_rope")
def pairs_interleaved(port, right, x, at, site):
    cos, sin = port.table(at, site)
    a, b = x[..., 0::2], x[..., 1::2]
    return port.round(np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape))


@step("rotate", "0.q_rope")
def half_of_channels(port, right, x, at, site):
    half = port.width // 2
    angles = at[..., None, None] * port.theta ** (-np.arange(0, half, 2) / half)
    cos, sin = np.cos(angles).astype(port.work), np.sin(angles).astype(port.work)
    a, b = np.split(x[..., :half], 2, -1)
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., half:]], -1)
    return port.round(turned)


@step("rotate", "0.q_rope")
def last_head_unrotated(port, right, x, at, site):
    found = right(x, at, site)
    if site.endswith("q_rope"):
        found[:, :, -1] = x[:, :, -1]
    return found


@step("rotate", "0.k_rope")
def keys_unrotated(port, right, x, at, site):
    return x if site.endswith("k_rope") else right(x, at, site)


@step("store", "0.attention")
def values_rotated(port, right, k, v, layer, past):
    right(k, port.rotate(v, port.positions(past, v.shape[1]), "values"), layer, past)


@edit("0.q_rope")
def exponent_of_hidden_size(port):
    port.frequencies = lambda: port.theta ** (-np.arange(0, port.width, 2) / 64)


@edit("0.q_rope")
def exponent_not_doubled(port):
    port.frequencies = lambda: port.theta ** (-np.arange(port.width // 2) / port.width)


@step("table", "0.q_rope")
def cos_and_sin_swapped(port, right, at, site):
    return right(at, site)[::-1]


@step("rotate", "0.q_rope")
def first_half_overwritten(port, right, x, at, site):
    cos, sin = port.table(at, site)
    a, b = np.split(x, 2, -1)
    a = a * cos - b * sin
    return port.round(np.concatenate([a, b * cos + a * sin], -1))


@step("frequencies", "0.q_rope", FAR)
def frequencies_bfloat16(port, right):
    return bfloat16(right())


@step("table", "0.q_rope", FAR)
def angles_float16(port, right, at, site):
    angles = float16(float16(at)[..., None, None] * float16(port.frequencies()))
    return np.cos(angles), np.sin(angles)


@step("rotate", "0.q_rope")
def angles_of_last_token(port, right, x, at, site):
    return right(x, at[:, np.arange(at.shape[1]) // 8 * 8 + 7], site)


def _meta(w: np.ndarray, heads: int) -> np.ndarray:
    return w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def _hf(w: np.ndarray, heads: int) -> np.ndarray:
    return w.reshape(heads, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


@edit("0.k_proj")
def key_heads_count(port):
    for name in port.w:
        if name.endswith("k_proj.weight"):
            port.w[name] = _meta(_hf(port.w[name], port.kv), port.heads)


@edit("0.q_proj")
def queries_and_keys_permuted(port):
    for name in port.w:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            port.w[name] = _hf(port.w[name], len(port.w[name]) // port.width)


@edit("0.k_proj")
def keys_only_permuted(port):
    for name in port.w:
        if name.endswith("k_proj.weight"):
            port.w[name] = _hf(port.w[name], port.kv)
