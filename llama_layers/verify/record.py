"""Traces of our own forward pass."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from llama_layers.arrays.describe import describe
from llama_layers.arrays.dtypes import accumulate_format, dtype_name, dtype_of, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.attention import shifted_exp
from llama_layers.model.forward import forward
from llama_layers.model.inputs import Inputs
from llama_layers.model.llama import Llama
from llama_layers.verify.sites import Site, sites
from llama_layers.verify.trace import Trace
from llama_layers.version import __version__


def record(
    model: Llama,
    input_ids: Any,
    /,
    *,
    sites: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    positions: Any | None = None,
    attention_mask: Any | None = None,
) -> Trace:
    """Run a model and keep the array of every site.

    Parameters
    ----------
    model : Llama
        Its weights decide library, device and dtype; float64 weights make an exact reference.
    input_ids : Array, shape [B, S], an integer dtype
        Token ids.
    sites : iterable of str, optional
        Which sites: names, names inside a layer ("self_attn.q_proj"), their last words ("q_proj"),
        or patterns of these ("mlp.*"). By default all, but for "scores" and "probabilities", which
        hold a number for each pair of tokens.
    layers : iterable of int, optional
        Which layers' sites; all by default. What is outside the layers is kept in any case.
    positions, attention_mask : as for `forward`
        The tokens' positions, and which of them are not padding.

    Returns
    -------
    Trace
        With NumPy arrays.

    Raises
    ------
    TypeError, ValueError
        As `forward` does; and if `sites` or `layers` names none of the model's.

    Examples
    --------
    >>> import numpy as np
    >>> from llama_layers import load
    >>> from llama_layers.verify import record
    >>> model = load("smollm2-135m")  # doctest: +SKIP
    >>> trace = record(model, np.array([[1, 2, 3]]), sites=["q_proj"])  # doctest: +SKIP
    """
    if not isinstance(model, Llama):
        raise TypeError(f"model: expected a Llama, got {type(model).__name__}")
    chosen = chosen_sites(model.config, sites, layers)
    wanted = {site.name for site in chosen}
    pairwise = [site for site in chosen if site.pairwise]
    needed = wanted | {name for site in pairwise for name in _inputs_of_scores(site)}
    arrays: dict[str, Any] = {}

    def keep(name: str, array: Any) -> Any:
        if name in needed:
            arrays[name] = array
        return array

    logits = forward(
        model, input_ids, positions=positions, attention_mask=attention_mask, tap=keep
    ).logits
    xp = namespace(logits=logits)
    inputs = Inputs.of(logits, model.config, None, positions, attention_mask)
    for site in pairwise:
        q, k = (arrays[name] for name in _inputs_of_scores(site))
        scores = _scores(xp, q, k)
        if site.operation == "softmax":
            assert site.layer is not None  # pairs are of a layer's tokens
            mask = inputs.masks[model.config.window_of(site.layer)]
            scores = _softmax(xp, scores, mask.rows(0, q.shape[1]))
        arrays[site.name] = xp.astype(scores, q.dtype, copy=False)
    return Trace(
        {site.name: to_numpy(arrays[site.name]) for site in chosen},
        input_ids=to_numpy(input_ids),
        positions=to_numpy(inputs.positions),
        attention_mask=None if attention_mask is None else to_numpy(attention_mask) != 0,
        metadata=_metadata(model, xp, logits),
    )


def chosen_sites(
    config: LlamaConfig, patterns: Iterable[str] | None, layers: Iterable[int] | None
) -> list[Site]:
    """Return the sites that patterns name; raise ValueError if a pattern or layer names none."""
    every = sites(config)
    if isinstance(patterns, str):
        raise TypeError(f"sites: expected a list of names, got the text {patterns!r}")
    if layers is not None:
        kept = set(_known_layers(layers, config.num_hidden_layers))
        every = tuple(site for site in every if site.layer is None or site.layer in kept)
    if patterns is None:
        return [site for site in every if not site.pairwise]
    found: set[str] = set()
    for pattern in patterns:
        matches = {site.name for site in every for n in _names_of(site) if fnmatchcase(n, pattern)}
        if not matches:
            names = {name for site in every for name in _names_of(site)}
            close = difflib.get_close_matches(pattern, sorted(names), n=1)
            said = f" (is it {close[0]!r}?)" if close else ""
            raise ValueError(
                f"sites: expected names of sites, got {pattern!r}, which names none{said}"
            )
        found |= matches
    return [site for site in every if site.name in found]


def _known_layers(layers: Iterable[int], count: int) -> Iterator[int]:
    """Yield layers up to the first that the model does not have: there may be billions."""
    for layer in layers:
        if layer not in range(count):
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {layer!r}")
        yield layer


def _names_of(site: Site) -> tuple[str, str, str]:
    return site.name, site.role, site.role.rpartition(".")[2]


def _inputs_of_scores(site: Site) -> tuple[str, str]:
    name = f"model.layers.{site.layer}.self_attn"
    return f"{name}.q_rope", f"{name}.k_rope"


def _scores(xp: Any, q: Any, k: Any) -> Any:
    """Return scaled products [B, heads, S, T] in the format of sums, all at once."""
    wide = dtype_of(xp, accumulate_format(float_format("q", q)).name)
    batch, count, heads, width = q.shape
    kv_heads = k.shape[2]
    q = xp.permute_dims(xp.astype(q, wide, copy=False), (0, 2, 1, 3))
    q = xp.reshape(q, (batch, kv_heads, heads // kv_heads * count, width))
    kt = xp.permute_dims(xp.astype(k, wide, copy=False), (0, 2, 3, 1))
    return xp.reshape(q @ kt * (1 / math.sqrt(width)), (batch, heads, count, k.shape[1]))


def _softmax(xp: Any, scores: Any, allowed: Any) -> Any:
    weights = shifted_exp(xp, scores, xp.expand_dims(allowed, axis=1))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return weights / xp.where(total == 0, xp.ones_like(total), total)


def _metadata(model: Llama, xp: Any, logits: Any) -> dict[str, str]:
    form = float_format("logits", logits)
    return {
        "engine": f"llama_layers {__version__}",
        "config": json.dumps(model.config.to_json()),
        "dtype": form.name,
        "accumulate": accumulate_format(form).name,
        "weights": dtype_name(model.weights.embed_tokens.dtype),
        "numpy_version": np.__version__,
        **describe(xp, logits),
    }
