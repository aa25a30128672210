"""The operation at a site, with the port's own inputs and the model's weights."""

from __future__ import annotations

import math

import numpy as np

from llama_layers.arrays.transfer import to_numpy
from llama_layers.arrays.types import Array
from llama_layers.layers.sites import Site
from llama_layers.layers.weights import LayerWeights, tensor_shapes
from llama_layers.model.llama import Llama
from llama_layers.parallel.plan import SUMMED
from llama_layers.verify.operations import (
    Attention,
    Embedding,
    Gate,
    Linear,
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
        return Embedding(recorded.input_ids, to_numpy(model.weights.embed_tokens))
    if site.operation == "norm":
        x = _heads(inputs[0], config.head_dim) if len(site.shape) == 4 else _flat(inputs[0])
        return Norm(x, to_numpy(matrix(site, model)[0]), config.rms_norm_eps)
    if site.operation == "linear":
        weight, bias = matrix(site, model)
        added = None if bias is None else to_numpy(bias)
        return Linear(_flat(inputs[0]), to_numpy(weight), added, site.role in SUMMED)
    if site.operation == "residual":
        x, added = inputs
        error = recorded.errors.get(route[1])
        off = None if error is None else to_numpy(error.read()).reshape(added.shape)
        return Residual(x, added, off)
    if site.operation == "gate":
        return Gate(inputs[0], inputs[1])
    if site.operation == "rope":
        return Rope(_heads(inputs[0], config.head_dim), recorded.positions, config)
    if site.operation == "logprobs":
        whole = known and info_of(recorded.arrays, site.name).shape[-1] == config.vocab_size
        return Logprobs(inputs[0], None if whole else recorded.next_ids, recorded.temperature)
    assert site.layer is not None  # attention is inside a layer
    scale = 1 / math.sqrt(config.head_dim)
    mask, past = recorded.allowed(site.layer), recorded.past
    if site.operation == "scores":
        return Scores(inputs[0], past.joined(site.layer, KEY, inputs[1]), mask, scale)
    if site.operation == "softmax":
        if len(inputs) == 1:
            return Softmax(inputs[0], mask)
        return Probabilities(inputs[0], past.joined(site.layer, KEY, inputs[1]), mask, scale)
    v = past.joined(site.layer, VALUE, _heads(inputs[-1], config.head_dim))
    if len(inputs) == 2:
        return WeightedSum(inputs[0], v)
    return Attention(inputs[0], past.joined(site.layer, KEY, inputs[1]), v, mask, scale)


def matrix(site: Site, model: Llama) -> tuple[Array, Array | None]:
    """The weight at a site, ones for a norm without one, and the bias of its projection."""
    if site.layer is None:
        return getattr(model.weights, site.name.removeprefix("model.")), None
    if site.operation == "norm" and f"{site.role}.weight" not in tensor_shapes(model.config):
        return np.ones(int(site.shape[-1]), np.float32), None
    return layer_matrix(model.weights.layers[site.layer], site.role)


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
