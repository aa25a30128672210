"""Traces of our own forward pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np

from llama_layers.arrays.describe import describe
from llama_layers.arrays.dtypes import accumulate_format, dtype_name, float_format
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array, Namespace
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.errors import shown
from llama_layers.layers.cache import KVCache
from llama_layers.layers.sites import LOGPROBS, Site, names_matching, names_of, sites
from llama_layers.model.forward import forward
from llama_layers.model.inputs import Inputs
from llama_layers.model.llama import Llama
from llama_layers.model.logprobs import log_softmax, picked
from llama_layers.verify.past import KEY, VALUE
from llama_layers.verify.trace import Trace
from llama_layers.version import __version__


def record(
    model: Llama,
    input_ids: Array,
    /,
    *,
    sites: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    positions: Array | None = None,
    attention_mask: Array | None = None,
    cache: KVCache | None = None,
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
        hold a number for each pair of tokens, and "logprobs", of each token after the first, which
        no pattern matches.
    layers : iterable of int, optional
        Which layers' sites; all by default. What is outside the layers is kept in any case.
    positions, attention_mask : as for `forward`
        The tokens' positions, and which of them are not padding.
    cache : KVCache, optional
        Keys and values of the tokens before these. They are recorded as ``self_attn.past_key`` and
        ``self_attn.past_value``; the cache itself is left as it is.

    Returns
    -------
    Trace
        With NumPy arrays.

    Raises
    ------
    TypeError, ValueError
        As `forward` does; if `sites` or `layers` names none of the model's; and if a cache is a
        ring and `sites` names scores or probabilities, whose keys are in another order there.

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
    if not isinstance(cache, KVCache | None):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    chosen = chosen_sites(model.config, sites, layers)
    arrays: dict[str, Array] = {}
    past: dict[str, np.ndarray] = {}
    keep_past = None
    if cache is not None and cache.length:
        if cache.window is not None and any(site.pairwise for site in chosen):
            raise ValueError("sites: expected none of pairs of tokens with a cache that is a ring")
        past, keep_past = _past(cache, {site.layer for site in chosen} - {None})

    def keep(name: str, array: Array) -> Array:
        arrays[name] = array
        return array

    tap = dict.fromkeys((site.name for site in chosen if site.name != LOGPROBS), keep)
    logits = forward(
        model,
        input_ids,
        cache=None if cache is None else cache.copy(),
        positions=positions,
        attention_mask=attention_mask,
        tap=tap,
    ).logits
    xp = namespace(logits=logits)
    for site in chosen:
        if site.pairwise:  # of the dtype of the others
            arrays[site.name] = xp.astype(arrays[site.name], logits.dtype, copy=False)
        if site.name == LOGPROBS:
            arrays[LOGPROBS] = picked(xp, log_softmax(xp, logits[:, :-1, :]), input_ids[:, 1:])
    inputs = Inputs.of(logits, model.config, cache, positions, attention_mask)
    return Trace(
        {site.name: to_numpy(arrays[site.name]) for site in chosen} | past,
        input_ids=to_numpy(input_ids),
        positions=to_numpy(inputs.positions),
        attention_mask=_mask(input_ids, attention_mask, keep_past),
        metadata=_metadata(model, xp, logits),
    )


def _past(
    cache: KVCache, layers: set[int | None]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Return a cache's keys and values in the order of their tokens, and which are not padding."""
    slots = to_numpy(cache.key_slots())
    order = np.argsort(slots, kind="stable")[np.count_nonzero(slots < 0) :]

    def ordered(array: Array) -> np.ndarray:
        return np.asarray(to_numpy(cache.visible(array))[:, order])

    arrays: dict[str, np.ndarray] = {}
    for layer in sorted(layer for layer in layers if layer is not None):
        arrays[f"model.layers.{layer}.{KEY}"] = ordered(cache.keys[layer])
        arrays[f"model.layers.{layer}.{VALUE}"] = ordered(cache.values[layer])
    return arrays, None if cache.keep is None else ordered(cache.keep)


def _mask(input_ids: Array, given: Array | None, past: np.ndarray | None) -> np.ndarray | None:
    """Return which tokens are not padding, those of the past first if some of them are."""
    batch, count = input_ids.shape
    own = np.ones((batch, count), bool) if given is None else to_numpy(given)[:, -count:] != 0
    if past is not None:
        return np.concatenate([past, own], axis=1)
    return None if given is None else own


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
        return [site for site in every if not site.optional]
    known = names_of(site for site in every if site.name != LOGPROBS)
    found: set[str] = set()
    for pattern in patterns:
        found.update([LOGPROBS] if pattern == LOGPROBS else names_matching("sites", pattern, known))
    return [site for site in every if site.name in found]


def _known_layers(layers: Iterable[int], count: int) -> Iterator[int]:
    """Yield layers up to the first that the model does not have: there may be billions."""
    for layer in layers:
        if layer not in range(count):
            raise ValueError(f"layers: expected numbers from 0 to {count - 1}, got {shown(layer)}")
        yield layer


def _metadata(model: Llama, xp: Namespace, logits: Array) -> dict[str, str]:
    form, group = float_format("logits", logits), model.weights.group
    ranks = {} if group is None else {"tensor_parallel": f"{group.size} ranks, {form.name} reduce"}
    return {
        "engine": f"llama_layers {__version__}",
        "config": json.dumps(model.config.to_json()),
        "dtype": form.name,
        "accumulate": accumulate_format(form).name,
        "weights": dtype_name(model.weights.embed_tokens.dtype),
        "numpy_version": np.__version__,
        **describe(xp, logits),
        **ranks,
    }
