"""Mistakes anywhere between a site and the last recorded ones, for sites that have no bound.

Each is a run of the layers between with the mistake in it: with other weights, another config, or a
tap that changes an array on its way. Taps of queries and keys may change the order of channels:
attention is the same as with the mistake, and what comes before it is not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_layers.arrays.transfer import to_numpy
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.tap import Tap
from llama_layers.layers.weights import LayerWeights
from llama_layers.verify.fit import in_halves
from llama_layers.verify.hypotheses.hidden_states import DETAIL, LATE, are_late
from llama_layers.verify.hypotheses.mlp import FORMULAS
from llama_layers.verify.inherited import Run

_THETAS = (1e4, 5e5, 1e6)
_EPS = (1e-5, 1e-6)
_GATES = ("gelu for silu", "gelu (tanh) for silu", "gate and up swapped in the product")
# Of so many layers or fewer each is held against every other layer's weights.
_FEW = 2


class Composed(NamedTuple):
    """A run with a mistake in it."""

    name: str
    detail: str
    run: Run


def composed(run: Run, between: Sequence[int]) -> Iterator[Composed]:
    """Mistakes that some layers may hold, the more frequent first."""
    yield from _layers(run, between)
    yield from _taps(run)
    yield from _configs(run)
    yield from _weights(run)
    yield Composed(
        "no causal mask",
        "Every token seems to see all tokens; it should see none after it.",
        replace(run, causal=False),
    )


def _layers(run: Run, between: Sequence[int]) -> Iterator[Composed]:
    """A layer that was not run, or run with the weights of another."""
    for layer in between:
        yield Composed(
            "layer left out",
            f"The port seems to pass layer {layer} by.",
            replace(run, tap=_at(_ends([layer]), np.zeros_like)),
        )
    for since in (between[i:] for i in range(len(between) - 1)):
        yield Composed(
            "last layers left out",
            f"The port seems to pass layers {since[0]} to {since[-1]} by.",
            replace(run, tap=_at(_ends(since), np.zeros_like)),
        )
    if len(between) > _FEW:
        return
    late = are_late(run)
    for layer in between:
        for other in range(run.model.config.num_hidden_layers):
            if other != layer:
                # From the layer before it, whose input it is, the layer before it was computed.
                name, detail = (
                    (LATE, DETAIL)
                    if late and other == layer - 1
                    else (
                        "another layer's weights",
                        f"The port seems to run layer {layer} with the weights of layer {other}.",
                    )
                )
                yield Composed(name, detail, _with_layers(run, places={layer: other}))


def _ends(layers: Sequence[int]) -> set[str]:
    """The sites that add what layers compute."""
    blocks = ("self_attn.o_proj", "mlp.down_proj")
    return {f"model.layers.{layer}.{block}" for layer in layers for block in blocks}


def _taps(run: Run) -> Iterator[Composed]:
    config = run.model.config
    width, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    both = {"self_attn.q_proj", "self_attn.k_proj"}
    yield Composed(
        "RoPE layout interleaved",
        "The port seems to pair channels 2i and 2i + 1; this checkpoint pairs i and i + D / 2.",
        replace(run, tap=_at(both, lambda y: in_halves(y, width))),
    )
    yield Composed(
        "RoPE permutation left in",
        "The port seems to use rows of queries and keys whose channels stand in pairs 2i and "
        "2i + 1, as in a file of Meta or llama.cpp; they should be put back to i and i + D / 2.",
        replace(run, tap=_at(both, lambda y: _in_pairs(y, width))),
    )
    yield Composed(
        "RoPE turned the other way",
        "The port seems to rotate by the negative angles.",
        replace(run, tap=_at(both, lambda y: _halves_swapped(y, width))),
    )
    yield Composed(
        "RoPE not applied",
        "Queries and keys seem not to be turned.",
        replace(run, recorded=replace(run.recorded, positions=0 * run.recorded.positions)),
    )
    for scale, said in (
        (1.0, "1"),
        (1 / width, "1 / D"),
        (config.hidden_size**-0.5, "1 / sqrt(H)"),
    ):
        factor = scale * math.sqrt(width)
        yield Composed(
            "another scale of scores",
            f"The port seems to scale scores by {said}; it should be by 1 / sqrt(D).",
            replace(run, tap=_at({"self_attn.q_rope"}, partial(np.multiply, factor))),
        )
    if 1 < groups < heads:
        tiled = np.arange(heads).reshape(-1, groups).T.ravel()
        yield Composed(
            "key heads tiled",
            f"The port seems to give query head h the key head h % {groups}; it should be "
            f"h // {heads // groups}.",
            replace(run, tap=_reordered(tiled)),
        )
    for role, block in (("self_attn.o_proj", "attention"), ("mlp.down_proj", "the MLP")):
        yield Composed(
            "block not added",
            f"The port seems not to add what {block} computes.",
            replace(run, tap=_at({role}, np.zeros_like)),
        )
    for name in _GATES:
        formula, text = FORMULAS[name]
        yield Composed(
            name,
            f"The port seems to compute {text}; it should be silu(gate) * up.",
            replace(run, tap=_gated(formula)),
        )
    yield Composed(
        "embedding scaled by the root of hidden_size",
        "The port seems to multiply the embedding with the root of hidden_size, as Gemma does; "
        "Llama does not.",
        replace(run, tap=_at({"model.embed_tokens"}, lambda y: y * math.sqrt(y.shape[-1]))),
    )


def _configs(run: Run) -> Iterator[Composed]:
    config = run.model.config
    for theta in _THETAS:
        if theta != config.rope_theta:
            yield Composed(
                "another rope_theta",
                f"The port seems to compute with rope_theta {theta:g}; this model has "
                f"{config.rope_theta:g}.",
                _with_config(run, replace(config, rope_theta=theta)),
            )
    if config.rope_scaling is not None:
        yield Composed(
            "RoPE scaling ignored",
            "The port seems to leave the model's RoPE scaling out.",
            _with_config(run, replace(config, rope_scaling=None)),
        )
    for eps in _EPS:
        if eps != config.rms_norm_eps:
            yield Composed(
                "another eps",
                f"The port seems to add an eps of {eps:g}; this model has {config.rms_norm_eps:g}.",
                _with_config(run, replace(config, rms_norm_eps=eps)),
            )
    if config.sliding_window is not None:
        wide = replace(config, sliding_window=config.max_position_embeddings)
        yield Composed(
            "another window",
            f"The port seems to see all earlier tokens; the window is {config.sliding_window}.",
            _with_config(run, wide),
        )


def _weights(run: Run) -> Iterator[Composed]:
    config = run.model.config
    yield Composed(
        "norm weight skipped",
        "The port seems to leave the weights of norms out.",
        _with_layers(run, lambda w: _norms(w, np.ones_like)),
    )
    yield Composed(
        "norm weight plus one",
        "The port seems to add one to the weights of norms, as Gemma does; Llama does not.",
        _with_layers(run, lambda w: _norms(w, lambda weight: weight + weight.dtype.type(1))),
    )
    yield Composed(
        "keys and values swapped",
        "The port seems to swap the matrices of keys and values.",
        _with_layers(run, _keys_and_values_swapped),
    )
    if config.qkv_bias or config.mlp_bias:
        yield Composed(
            "bias missing",
            "The port seems to add no bias; this model has some.",
            _with_layers(run, _without_bias),
        )


def _at(names: set[str], change: Callable[[NDArray[Any]], NDArray[Any]]) -> Tap:
    """A tap at some sites, named with their layer or for all layers."""

    def tap(name: str, array: Any) -> Any:
        return change(array) if name in names or _role(name) in names else array

    return tap


def _role(name: str) -> str:
    return name.split(".", 3)[3] if name.count(".") > 2 else name


def _reordered(heads: NDArray[np.intp]) -> Tap:
    """Query heads in another order before attention, and back after it."""
    back = np.argsort(heads)

    def tap(name: str, array: Any) -> Any:
        if _role(name) == "self_attn.q_rope":
            return array[:, :, heads]
        return array[:, :, back] if _role(name) == "self_attn.attention" else array

    return tap


def _gated(formula: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]) -> Tap:
    """Another function of gate and up."""
    seen: dict[str, Any] = {}

    def tap(name: str, array: Any) -> Any:
        seen[_role(name)] = array
        if _role(name) != "mlp.act":
            return array
        return formula(seen["mlp.gate_proj"], seen["mlp.up_proj"]).astype(array.dtype)

    return tap


def _in_pairs(array: NDArray[Any], width: int) -> NDArray[Any]:
    """Halves of each head put side by side, pair by pair: the inverse of `in_halves`."""
    halves = array.reshape(*array.shape[:2], -1, 2, width // 2)
    return np.ascontiguousarray(np.swapaxes(halves, -1, -2)).reshape(array.shape)


def _halves_swapped(array: NDArray[Any], width: int) -> NDArray[Any]:
    """A rotate of what this gives is the other way round, but for the order of channels."""
    halves = array.reshape(*array.shape[:2], -1, 2, width // 2)
    return np.ascontiguousarray(halves[..., ::-1, :]).reshape(array.shape)


class _Layers(Sequence[LayerWeights]):
    """Layers of a model in other places, each changed when it is asked for."""

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        change: Callable[[LayerWeights], LayerWeights],
        places: Mapping[int, int],
    ) -> None:
        self._layers, self._change, self._places = layers, change, places

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: Any) -> Any:
        return self._change(self._layers[self._places.get(layer, layer)].mapped(to_numpy))


def _with_layers(
    run: Run,
    change: Callable[[LayerWeights], LayerWeights] = lambda w: w,
    places: Mapping[int, int] = MappingProxyType({}),
) -> Run:
    weights = run.model.weights
    layers = _Layers(weights.layers, change, places)
    return replace(run, model=replace(run.model, weights=replace(weights, layers=layers)))


def _with_config(run: Run, config: LlamaConfig) -> Run:
    return replace(run, model=replace(run.model, config=config))


def _norms(w: LayerWeights, change: Callable[[Any], Any]) -> LayerWeights:
    return replace(
        w,
        input_layernorm=change(w.input_layernorm),
        post_attention_layernorm=change(w.post_attention_layernorm),
    )


def _keys_and_values_swapped(w: LayerWeights) -> LayerWeights:
    qkv = w.self_attn.qkv
    keys = qkv.num_kv_heads * qkv.head_dim
    rows = np.r_[: qkv.num_heads * qkv.head_dim]
    start = len(rows)
    rows = np.r_[rows, start + keys : start + 2 * keys, start : start + keys]
    bias = None if qkv.bias is None else qkv.bias[rows]
    swapped = replace(qkv, fused=qkv.fused[rows], bias=bias)
    return replace(w, self_attn=replace(w.self_attn, qkv=swapped))


def _without_bias(part: Any) -> Any:
    """Weights, or a part of them, whose biases are None."""
    changes = {
        f.name: None if "bias" in f.name else _without_bias(getattr(part, f.name))
        for f in fields(part)
        if "bias" in f.name or is_dataclass(getattr(part, f.name))
    }
    return replace(part, **changes)
