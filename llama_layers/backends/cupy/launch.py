"""The kernels of decoding, as functions of arrays: every result has its memory already."""

from __future__ import annotations

import math

import numpy as np

from llama_layers.arrays.dtypes import dtype_name
from llama_layers.backends.cupy.compile import CONSTANTS, FORMATS, launch
from llama_layers.backends.libraries import CupyArray, cupy

MAX_TOKENS = 8
"""Rows of x that the kernels take at once, and sequences that they decode."""
_LOAD = 16  # bytes that a thread reads at once
_WARPS = CONSTANTS["gemv"]["WARPS"]
_NORM_THREADS = CONSTANTS["norm"]["THREADS"]
_THREADS = CONSTANTS["tokens"]["THREADS"]
_SHARE = _THREADS * CONSTANTS["tokens"]["OWN"]
_ATTEND = CONSTANTS["attend"]
# Numbers of a block's query heads: with all else they fit into 48 KiB of shared memory.
_QUERY_NUMBERS = 2048


def norm(x: CupyArray, weight: CupyArray, out: CupyArray, eps: float) -> None:
    """RMSNorm of each row of x [M, H]."""
    count = _count(x.shape[1], x, weight, out)
    each = math.ceil(x.shape[1] / (count * _NORM_THREADS))
    macros = {"FORMAT": _format(x, weight, out), "COUNT": count, "EACH": each}
    arguments = (x, weight, out, np.int32(x.shape[1]), np.float32(eps))
    launch("norm", "rms_norm", (x.shape[0],), (_NORM_THREADS,), arguments, **macros)


def takes_gemv(
    x: CupyArray, weight: CupyArray, out: CupyArray, bias: CupyArray | None = None
) -> bool:
    """Whether `gemv` multiplies these: a few rows, contiguous and of one dtype."""
    arrays = [a for a in (x, weight, bias) if a is not None]
    return (
        0 < x.shape[0] <= MAX_TOKENS
        and {dtype_name(a.dtype) for a in arrays} == {dtype_name(x.dtype)}
        and dtype_name(x.dtype) in FORMATS
        and dtype_name(out.dtype) in (dtype_name(x.dtype), "float32")
        and bool(x.size and weight.size)
        and all(a.flags.c_contiguous for a in (*arrays, out))
    )


def gemv(
    x: CupyArray,
    weight: CupyArray,
    out: CupyArray,
    *,
    bias: CupyArray | None = None,
    residual: CupyArray | None = None,
) -> None:
    """``out = x @ weight.T + bias + residual`` for x [M, K], M <= 8; out may be float32."""
    rows = _rows(x.shape[0])
    _format(x, weight, *(a for a in (bias,) if a is not None))
    floats = int(dtype_name(out.dtype) == "float32")
    arguments = (x, weight, bias, residual, out, *_sizes(weight))
    blocks = math.ceil(weight.shape[0] / (rows * _WARPS))
    macros = _macros(rows, x, weight) | {"FLOATS": floats}
    launch("gemv", "gemv", (blocks,), (32 * _WARPS,), arguments, **macros)


def gemv_swiglu(
    x: CupyArray,
    gate: CupyArray,
    up: CupyArray,
    out: CupyArray,
    *,
    gate_bias: CupyArray | None = None,
    up_bias: CupyArray | None = None,
) -> None:
    """``silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)`` for x [M, K], M <= 8."""
    rows = _rows(x.shape[0])
    _format(x, gate, up, out, *(a for a in (gate_bias, up_bias) if a is not None))
    arguments = (x, gate, up, gate_bias, up_bias, out, *_sizes(gate))
    blocks = math.ceil(gate.shape[0] / (max(1, rows // 2) * _WARPS))  # half of the rows of each
    macros = _macros(rows, x, gate, up) | {"FLOATS": 0}
    launch("gemv", "gemv_swiglu", (blocks,), (32 * _WARPS,), arguments, **macros)


def rope_cache(
    qkv: CupyArray,
    cos: CupyArray,
    sin: CupyArray,
    rows: CupyArray,
    length: CupyArray,
    keys: CupyArray,
    values: CupyArray,
    q: CupyArray,
) -> None:
    """Rotate queries and keys of qkv [M, (heads + 2 kv_heads) * D]; write keys and values."""
    sequences, capacity, kv_heads, width = keys.shape
    heads = q.shape[1] // width
    sizes = (np.int32(n) for n in (heads, kv_heads, width // 2, capacity))
    arguments = (qkv, cos, sin, rows, length, keys, values, q, *sizes)
    threads = min(1024, math.ceil(width / 64) * 32)
    launch(
        "rope_cache", "rope_cache", (heads + 2 * kv_heads, sequences), (threads,), arguments,
        FORMAT=_format(qkv, keys, values, q),
    )  # fmt: skip


def attend_scratch(
    sequences: int, heads: int, width: int, capacity: int
) -> tuple[CupyArray, CupyArray]:
    """Memory for the result of each piece of the context in `attend`."""
    xp = cupy()
    pieces = (sequences, heads, math.ceil(capacity / _ATTEND["CHUNK"]))
    return (
        xp.empty((*pieces, width), dtype=xp.float32),
        xp.empty((*pieces, 2), dtype=xp.float32),
    )


def attend(
    q: CupyArray,
    keys: CupyArray,
    values: CupyArray,
    length: CupyArray,
    out: CupyArray,
    scratch: tuple[CupyArray, CupyArray],
    *,
    window: int | None = None,
    keep: CupyArray | None = None,
) -> None:
    """Attention of one query a sequence, q [M, heads * D], that comes after `length` others."""
    sequences, capacity, kv_heads, width = keys.shape
    heads = q.shape[1] // width
    sums, ends = scratch
    chunks = sums.shape[2]
    group = heads // kv_heads
    most = max(1, min(8, _QUERY_NUMBERS // width))
    together = max(n for n in range(1, most + 1) if group % n == 0)
    macros = {"FORMAT": _format(q, keys, values, out), "WIDTH": width, "HEADS": together}
    macros["COUNT"] = _count(width, keys, values)
    farthest = 2**31 - 1 if window is None else window
    arguments = (
        q, keys, values, length, keep, sums, ends, np.int32(heads), np.int32(kv_heads),
        np.int32(capacity), np.int32(farthest), np.float32(1 / math.sqrt(width)),
    )  # fmt: skip
    grid = (chunks, heads // together, sequences)
    launch("attend", "attend_split", grid, (32 * _ATTEND["WARPS"],), arguments, **macros)
    joined = (sums, ends, length, out, np.int32(chunks), np.int32(capacity))
    block = (32 * _ATTEND["JOINING"],)
    launch("attend", "attend_join", (sequences * heads,), block, joined, **macros)


def embed(ids: CupyArray, table: CupyArray, out: CupyArray) -> None:
    """The rows of a table [V, H] for ids [M]; zeros for an id that is not in it."""
    sizes = np.int32(table.shape[1]), np.int32(table.shape[0])
    arguments = (ids, table, out, *sizes)
    grid = math.ceil(table.shape[1] / _THREADS), ids.shape[0]
    launch("tokens", "embed", grid, (_THREADS,), arguments, FORMAT=_format(table, out))


def draw_scratch(sequences: int, vocabulary: int) -> tuple[CupyArray, CupyArray]:
    """Memory for the result of each share of the logits in `argmax` and `sample`."""
    xp = cupy()
    shares = (sequences, math.ceil(vocabulary / _SHARE))
    return (
        xp.empty((*shares, 2), dtype=xp.float32),  # a number and a place, of 4 bytes each
        xp.empty(shares, dtype=xp.float64),
    )


def argmax(logits: CupyArray, ids: CupyArray, scratch: tuple[CupyArray, CupyArray]) -> None:
    """The first of the largest of float32 logits [M, V]; -1 where one is NaN."""
    shares, _ = scratch
    _largest(logits, shares)
    arguments = (shares, ids, np.int32(shares.shape[1]))
    launch("tokens", "argmax", ids.shape, (32,), arguments, FORMAT=0)


def sample(
    logits: CupyArray,
    uniforms: CupyArray,
    step: CupyArray,
    temperature: np.float32,
    ids: CupyArray,
    scratch: tuple[CupyArray, CupyArray],
) -> None:
    """Draw ids [M] by the numbers in row step[0] of uniforms [steps, M], float64; -1 for none."""
    shares, sums = scratch
    _largest(logits, shares)
    vocabulary, count = np.int32(logits.shape[1]), np.int32(shares.shape[1])
    weighed = (logits, shares, temperature, sums, vocabulary)
    launch("tokens", "weigh", (int(count), ids.shape[0]), (_THREADS,), weighed, FORMAT=0)
    drawn = (logits, shares, sums, uniforms, step, temperature, ids, vocabulary, count)
    launch("tokens", "draw", ids.shape, (_THREADS,), drawn, FORMAT=0)


def _largest(logits: CupyArray, shares: CupyArray) -> None:
    """The largest of each share of the logits."""
    arguments = (logits, shares, np.int32(logits.shape[1]))
    grid = shares.shape[1], logits.shape[0]
    launch("tokens", "largest_of_shares", grid, (_THREADS,), arguments, FORMAT=0)


def advance(length: CupyArray, rows: CupyArray, step: CupyArray) -> None:
    """Count one token more."""
    arguments = (length, rows, step, np.int32(rows.shape[0]))
    launch("tokens", "advance", (1,), (32,), arguments, FORMAT=0)


def _format(*arrays: CupyArray) -> int:
    """The format of a kernel's numbers, which all of its arrays must have."""
    names = {dtype_name(array.dtype) for array in arrays}
    if len(names) > 1:
        raise TypeError(f"a kernel takes arrays of one dtype, got {', '.join(sorted(names))}")
    return FORMATS[names.pop()]


def _count(columns: int, *arrays: CupyArray) -> int:
    """The most numbers that a thread reads at once such that rows and addresses are multiples."""
    size = int(arrays[0].dtype.itemsize)
    count = math.gcd(columns, _LOAD // size)
    return math.gcd(count * size, *(array.data.ptr for array in arrays)) // size


def _rows(tokens: int) -> int:
    """Rows of a weight for a warp: see gemv.cu. More tokens are worth more of them."""
    return 1 if tokens == 1 else 2 if tokens <= 4 else 4


def _macros(rows: int, x: CupyArray, *weights: CupyArray) -> dict[str, int]:
    """How gemv.cu reads x [M, K] and weights [N, K]."""
    count = _count(x.shape[1], x, *weights)
    return {"FORMAT": _format(x), "COUNT": count, "TOKENS": x.shape[0], "ROWS": rows}


def _sizes(weight: CupyArray) -> tuple[np.int32, ...]:
    return np.int32(weight.shape[0]), np.int32(weight.shape[1])
