"""The cases of ``llama-layers qkv``: a layer of a model and a text, or two built-in ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llama_layers.arrays.dtypes import dtype_of
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.types import Array
from llama_layers.backends.placement import placement
from llama_layers.checkpoint import load, open_checkpoint
from llama_layers.cli.options import Backend
from llama_layers.cli.prompt import prompt_ids
from llama_layers.config.llama_config import with_layers
from llama_layers.layers.weights import QKVWeights
from llama_layers.model.embedding import activations
from llama_layers.model.forward import forward
from llama_layers.model.llama import Llama
from llama_layers.model.weights import LlamaWeights
from llama_layers.verify import SiteResult, rms_norm_bound, sites
from llama_layers.verify.qkv import site_result


@dataclass(frozen=True)
class Case:
    """Hidden states, the projection they go through, and where both come from."""

    name: str
    title: str
    note: str
    source: str
    x: Array
    weights: QKVWeights
    tokens: list[str]
    norm: SiteResult | None = None


def builtin_cases(backend: Backend, dtype: str) -> list[Case]:
    """Return a case at Llama-2 7B dimensions, with equal weights, and one whose weights differ."""
    place = placement(backend)

    def case(name: str, title: str, note: str, x: Any, heads: int, values: list[float]) -> Case:
        hidden, stored = x.shape[-1], dtype_of(np, dtype)
        x = place(x.astype(np.float32).astype(stored))
        x = activations(namespace(x=x), x)
        weights = QKVWeights.from_separate(
            *(place(np.full((hidden, hidden), value, stored)) for value in values),
            num_heads=heads,
            layout="in_out",
        )
        tokens = [str(i) for i in range(x.shape[1])]
        return Case(name, title, note, f"{name}.input_layernorm", x, weights, tokens)

    ramp = np.sin(np.arange(2 * 4096) * 0.0001).reshape(1, 2, 4096) * 0.02
    normal = np.random.default_rng(0).standard_normal((1, 2, 128))
    return [
        case(
            "llama2_7b",
            "Llama-2 7B dimensions: hidden size 4096, 32 heads of 128, every weight 0.01",
            "Element i of x is sin(0.0001 i) * 0.02. The weights are equal, so Q, K, V must be.",
            ramp,
            32,
            [0.01, 0.01, 0.01],
        ),
        case(
            "divergence",
            "Weights 0.01, 0.02 and 0.03: hidden size 128, 4 heads of 32",
            "x is standard normal. The weights differ, so Q, K, V must.",
            normal,
            4,
            [0.01, 0.02, 0.03],
        ),
    ]


def model_case(model: str, text: str, layer: int, backend: Backend, dtype: str | None) -> Case:
    """Return the case of a layer of a model and a text."""
    if layer < 0:
        raise ValueError(f"--layer: expected zero or more, got {layer}")
    if layer >= (count := open_checkpoint(model).config.num_hidden_layers):
        raise ValueError(f"--layer: expected a number from 0 to {count - 1}, got {layer}")
    llama = load(model, backend=backend, dtype=dtype, layers=range(layer + 1))
    ids = prompt_ids(llama, text)
    name = f"model.layers.{layer}"
    known = {site.name: site for site in sites(llama.config)}
    read = known[known[f"{name}.self_attn.q_proj"].routes[0][0]]
    arrays = first_layers(llama, placement(backend)(np.asarray([ids])), layer + 1)
    x, weights = arrays[read.name], llama.weights.layers[layer]
    qkv, norm, does = weights.self_attn.qkv, None, "Projection"
    if weights.input_layernorm is not None:
        hidden, c = arrays[read.routes[0][0]], llama.config
        bound = rms_norm_bound(
            hidden, weights.input_layernorm, eps=c.rms_norm_eps, offset=c.norm_weight_offset
        )
        norm = site_result(read, x, bound)
        does = "RMSNorm, then projection"
    return Case(
        name=name,
        title=f"{model}, layer {layer}: {len(ids)} tokens of {_shortened(text)!r}",
        note=f"{does} to {qkv.num_heads} query and {qkv.num_kv_heads} key/value heads of "
        f"{qkv.head_dim}.",
        source=read.name,
        x=x,
        weights=qkv,
        tokens=[llama.tokenizer.decode([i]) for i in ids],
        norm=norm,
    )


def _shortened(text: str, most: int = 48) -> str:
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def first_layers(model: Llama, input_ids: Array, count: int) -> dict[str, Array]:
    """Return the arrays of all sites in the first layers of a model; the others are not run."""
    weights = model.weights
    embedding = weights.embed_tokens  # also for the head, whose logits nobody reads
    first = replace(
        model,
        config=with_layers(model.config, count),
        weights=LlamaWeights(embedding, weights.layers[:count], weights.norm, embedding),
    )
    arrays: dict[str, Array] = {}

    def tap(name: str, array: Array) -> Array:
        arrays[name] = array
        return array

    forward(first, input_ids, tap=tap, last_only=True)
    return arrays
