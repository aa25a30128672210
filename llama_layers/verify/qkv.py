"""The Q, K and V of some hidden states, held against their bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import accumulate_format, float_format
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.layers.linear import QKV, qkv_projection
from llama_layers.layers.sites import Site
from llama_layers.layers.weights import QKVWeights
from llama_layers.verify.bound import Bound
from llama_layers.verify.bounds.layer import linear_bound
from llama_layers.verify.distance import distance
from llama_layers.verify.judge import judge
from llama_layers.verify.report import SiteResult

# Elements that are further apart than this differ.
APART = 1e-6


@dataclass(frozen=True)
class Examined:
    """Q, K and V, and what was found of them."""

    qkv: QKV
    results: dict[str, SiteResult]  # what a check would find, for "q", "k" and "v"
    same_bits: bool  # whether a second run gave the same bits


def examine_qkv(x: Array, w: QKVWeights, /, *, layer: int = 0) -> Examined:
    """Project hidden states twice, and hold the results against their bounds.

    Parameters
    ----------
    x : Array, shape [B, S, hidden_size]
        Normalised hidden states.
    w : QKVWeights
        The projection, from the same library and device.
    layer : int, optional
        The layer that the results are named after.

    Returns
    -------
    Examined
        Q, K and V, and what was found of them.

    Raises
    ------
    TypeError, ValueError
        As `llama_layers.qkv_projection` does.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import QKVWeights
    >>> from llama_layers.verify import examine_qkv
    >>> w = QKVWeights(np.eye(12, 4, dtype=np.float32), num_heads=2, num_kv_heads=2)
    >>> found = examine_qkv(np.ones((1, 1, 4), np.float32), w)
    >>> found.same_bits, found.results["k"].verdict
    (True, 'PASS')
    """
    qkv, again = qkv_projection(x, w), qkv_projection(x, w)
    bound = linear_bound(x, w.fused, w.bias)
    name = f"model.layers.{layer}"
    results, start = {}, 0
    for letter, array in zip("qkv", qkv, strict=True):
        rows = array.shape[2] * array.shape[3]
        parts = (p[..., start : start + rows] for p in (bound.exact, bound.limit, bound.usual))
        split = Bound(*(part.reshape(array.shape) for part in parts))
        routes = ((f"{name}.input_layernorm",),)
        role = f"self_attn.{letter}_proj"
        site = Site(f"{name}.{role}", role, layer, "linear", ("B", "S", rows), routes)
        results[letter] = site_result(site, array, split)
        start += rows
    same_bits = all(
        to_numpy(first).tobytes() == to_numpy(second).tobytes()
        for first, second in zip(qkv, again, strict=True)
    )
    return Examined(qkv, results, same_bits)


def site_result(site: Site, array: Array, bound: Bound) -> SiteResult:
    """Hold the array of a site against its bound."""
    computed, judgement = to_numpy(array), judge(array, bound)
    form = float_format(site.name, array)
    return SiteResult(
        site=site,
        verdict=judgement.verdict,
        shape=computed.shape,
        dtype=form.name,
        accumulate=accumulate_format(form).name,
        inputs=site.routes[0],
        judgement=judgement,
        difference=distance(bound.exact, computed),
    )


def statistics(array: Array) -> dict[str, Any]:
    """Describe the numbers of an array: the range of the finite ones, and the first of all."""
    numbers = to_numpy(array).astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    ends = (finite.min(), finite.max(), finite.mean()) if finite.size else (math.nan,) * 3
    smallest, largest, mean = map(float, ends)
    return {
        "smallest": smallest,
        "largest": largest,
        "mean": mean,
        "first": numbers.ravel()[:5].tolist(),
        "nonfinite": numbers.size - finite.size,
    }


def differing(a: Array, b: Array) -> dict[str, int]:
    """Count the elements of two arrays, and those that are more than 1e-6 apart.

    Where the second has fewer heads, each of them is compared with all that attend to it.
    """
    x, y = (to_numpy(array).astype(np.float64) for array in (a, b))
    y = np.repeat(y, x.shape[2] // y.shape[2], axis=2)
    with np.errstate(invalid="ignore"):  # Inf - Inf: not a number, and so a difference
        close = np.abs(x - y) <= APART
    return {"differing": int(np.count_nonzero(~close)), "of": x.size}
