"""The operation at a site, with the port's own inputs and the model's weights."""

from __future__ import annotations

import math

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.config.llama_config import LlamaConfig
from llama_layers.layers.sites import Site
from llama_layers.layers.temperature import temperatures
from llama_layers.layers.weights import LayerWeights
from llama_layers.model.embedding import embedding_factor
from llama_layers.model.llama import Llama
from llama_layers.parallel.plan import SUMMED
from llama_layers.verify.operations import (
    Attention,
    Copy,
    Embedding,
    Gate,
    Linear,
    Logits,
    Logprobs,
    Norm,
    Operation,
    Probabilities,
    Residual,
    Rope,
    Scores,
    Softmax,
    WeightedSum,
)
from llama_layers.verify.past import KEY, VALUE
from llama_layers.verify.ranks import AddedParts
from llama_layers.verify.stored import info_of
from llama_layers.verify.validate import Recorded


def operation_of(site: Site, route: tuple[str, ...], recorded: Recorded, model: Llama) -> Operation:
    """The operation that gives a site, on the recorded arrays that the route names."""
    config = model.config
    known = site.name in recorded.arrays
    rows = info_of(recorded.arrays, site.name).shape[1] if known else recorded.count
    inputs = [_last(recorded, name, rows) for name in route]
    if site.operation == "embedding":
        assert recorded.input_ids is not None  # it is on no route without them
        table = model.weights.embed_tokens
        return Embedding(recorded.input_ids, to_numpy(table), embedding_factor(config, table))
    if site.operation == "norm":
        x = _heads(inputs[0], config.head_dim) if len(site.shape) == 4 else _flat(inputs[0])
        weights, offset = to_numpy(matrix(site, model)[0]), norm_offset(site, config)
        return Norm(x, weights, config.rms_norm_eps, offset, _parts(recorded, route[0]))
    if site.operation == "linear":
        weight, bias = matrix(site, model)
        added = None if bias is None else to_numpy(bias)
        return Linear(_flat(inputs[0]), to_numpy(weight), added, site.role in SUMMED)
    if site.operation == "residual":
        x, added = inputs
        return Residual(x, added, config.residual_multiplier, _parts(recorded, route[1]))
    if site.operation == "logits":
        return logits_of(inputs[0], config)
    if site.operation == "gate":
        return Gate(inputs[0], inputs[1], config.hidden_act)
    if site.operation == "rope":
        return _rope(_heads(inputs[0], config.head_dim), site, recorded, config)
    if site.operation == "logprobs":
        whole = known and info_of(recorded.arrays, site.name).shape[-1] == config.vocab_size
        return Logprobs(inputs[0], None if whole else recorded.next_ids, recorded.temperature)
    assert site.layer is not None  # attention is inside a layer
    scale, cap = config.attention_scale, config.attn_logit_softcapping
    sinks = None
    if (of_heads := model.weights.layers[site.layer].self_attn.sinks) is not None:
        sinks = to_numpy(of_heads)
    mask, past = recorded.allowed(site.layer), recorded.past
    if site.operation == "softmax" and len(inputs) == 1:
        return Softmax(inputs[0], mask, sinks)
    if site.operation == "attention":
        v = past.joined(site.layer, VALUE, _heads(inputs[-1], config.head_dim))
        if len(inputs) == 2:
            return WeightedSum(inputs[0], v)
    q, k = (_heads(array, config.head_dim) for array in inputs[:2])
    k = past.joined(site.layer, KEY, k)
    if site.operation == "scores":
        return Scores(q, k, mask, scale, cap)
    if site.operation == "softmax":
        return Probabilities(q, k, mask, scale, cap, sinks)
    return Attention(q, k, v, mask, scale, cap, sinks)


def norm_offset(site: Site, config: LlamaConfig) -> float:
    """What a norm adds to its weight: nothing where it has none."""
    weightless = site.role.endswith(("q_norm", "k_norm")) and not config.qk_norm_weight
    return 0.0 if weightless else config.norm_weight_offset


def logits_of(products: np.ndarray, config: LlamaConfig) -> Logits:
    """The operation that makes logits of what the head gives."""
    scaling = config.logits_scaling
    scaling = 1 / scaling if config.multiplies_logits else scaling
    return Logits(products, scaling, config.final_logit_softcapping)


def _parts(recorded: Recorded, name: str) -> AddedParts | None:
    """What ranks recorded of a sum before they added it; None if they did after."""
    parts = [to_numpy(part.read()) for part in recorded.parts.get(name, ())]
    return AddedParts.of(parts) if parts else None


def _rope(x: np.ndarray, site: Site, recorded: Recorded, config: LlamaConfig) -> Operation:
    assert site.layer is not None  # queries and keys are inside a layer
    rope = config.rope_of(site.layer)
    if rope is None:
        return Copy(x)
    temperature = None
    if config.llama_4_scaling_beta and site.role == "self_attn.q_rope":
        temperature = temperatures(recorded.positions, config)
    return Rope(x, recorded.positions, rope, temperature=temperature)


def matrix(site: Site, model: Llama) -> tuple[Array, Array | None]:
    """The weight at a site, ones for a norm without one, and the bias of its projection."""
    if site.layer is None:
        return getattr(model.weights, site.name.removeprefix("model.")), None
    layer = model.weights.layers[site.layer]
    if site.operation == "norm" and f"{site.role}.weight" not in layer.named():
        return np.ones(int(site.shape[-1]), np.float32), None
    return layer_matrix(layer, site.role)


def layer_matrix(layer: LayerWeights, role: str) -> tuple[Array, Array | None]:
    """The weight and the bias of one of a layer's modules."""
    named = layer.named()
    return named[f"{role}.weight"], named.get(f"{role}.bias")


def _last(recorded: Recorded, name: str, rows: int) -> np.ndarray:
    """The array of a site; its last tokens, where fewer were kept of what is computed from it."""
    array = recorded.array(name)
    return array[:, -rows:] if array.ndim == 3 and rows < array.shape[1] else array


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape[:2], math.prod(array.shape[2:]))


def _heads(array: np.ndarray, head_dim: int) -> np.ndarray:
    return array.reshape(*array.shape[:2], math.prod(array.shape[2:]) // head_dim, head_dim)
