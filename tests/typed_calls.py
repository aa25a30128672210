"""Calls as users write them, for mypy: it accepts them, except where a comment says the error.

Nothing here runs. Mypy reports a comment for an error that it does not find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

import numpy as np
from numpy.typing import NDArray

import llama_layers as ll
from llama_layers.arrays.types import Array, ArrayT

if TYPE_CHECKING:
    import jax
    import torch

    Floats = NDArray[np.float32]


def results_have_the_type_of_x(
    x: Floats, double: NDArray[np.float64], tensor: torch.Tensor, traced: jax.Array
) -> None:
    assert_type(ll.rms_norm(x, x, eps=1e-5), Floats)
    assert_type(ll.rms_norm(double, x, eps=1e-5), NDArray[np.float64])
    assert_type(ll.rms_norm(tensor, tensor, eps=1e-5), "torch.Tensor")
    assert_type(ll.rms_norm(traced, traced, eps=1e-5), "jax.Array")
    assert_type(ll.linear(x, x), Floats)
    assert_type(ll.swiglu(x, x), Floats)
    assert_type(ll.attention(x, x, x, scale=0.5), Floats)
    assert_type(ll.apply_rope(tensor, tensor, tensor, layout="interleaved"), "torch.Tensor")
    assert_type(ll.rms_norm(np.ones((2, 3)), np.ones(3), eps=1e-5).shape, tuple[int, int])


def weights_of_any_library(
    x: Floats, tensor: torch.Tensor, config: ll.LlamaConfig, state: dict[str, torch.Tensor]
) -> None:
    w = ll.QKVWeights.from_separate(tensor, tensor, tensor, num_heads=4, num_kv_heads=2)
    q, k, v = ll.qkv_projection(x, w)
    assert_type(q, Array)
    assert_type(ll.attention(q, k, v, mask=q[0, :, 0] > 0), Array)
    mlp = ll.MLPWeights(x, x, x)
    layer = ll.LayerWeights(x, ll.AttentionWeights(w, x), x, mlp)
    assert_type(layer.named(), dict[str, Array])
    assert_type(ll.mlp(x, mlp), Floats)
    assert_type(ll.LlamaWeights.from_named(state, config).embed_tokens, Array)
    assert_type(ll.Llama.from_state_dict(state, config), ll.Llama)


def a_conversation(ids: NDArray[np.int64]) -> str:
    model = ll.load("smollm2-135m", dtype=np.float32)
    seen: dict[str, Floats] = {}

    def tap(name: str, array: Floats) -> Floats:
        seen[name] = array
        return array

    cache = ll.KVCache.create(model, 1, 16)
    logits, _ = ll.forward(model, ids, cache=cache, tap=tap)
    first = ll.sample(logits[:, -1, :], temperature=0, rng=0)
    steps = ll.generate(model, ids, max_new_tokens=8, rng=np.random.default_rng(0))
    return model.tokenizer.decode([int(first[0]), *(int(step[0]) for step in steps)])


def inside_a_model(model: ll.Llama, ids: NDArray[np.int64], x: Floats) -> None:
    seen: dict[str, Floats] = {}

    def keep(name: str, array: Floats) -> Floats:
        return seen.setdefault(name, array)

    taps = {"model.layers.3.self_attn.probabilities": keep, "*.q_rope": keep}
    ll.forward(model, ids, mask=ids > 0, tap=taps)
    ll.forward(model, inputs_embeds=x, mask=ll.Mask(ids, ids), tap={"scores": keep})
    for step in ll.generate(model, ids, max_new_tokens=8, tap=taps):
        assert_type(step, Array)
    for step_ids, logprobs in ll.generate(
        model,
        ids,
        max_new_tokens=8,
        logits_processor=lambda so_far, logits: logits,
        return_logprobs=True,
    ):
        assert_type(step_ids, Array)
        assert_type(logprobs, Array)
    assert_type(ll.logprobs(model, ids, attention_mask=ids > 0), Array)


def scalars_of_numpy(model: ll.Llama, ids: NDArray[np.int64], x: Floats) -> None:
    half, count = np.float32(0.5), np.int64(3)
    ll.sample(x, temperature=half, top_k=count, top_p=np.float64(0.9), min_p=np.float16(0.1))
    ll.generate(model, ids, max_new_tokens=count, temperature=half, repetition_penalty=half)
    ll.rms_norm(x, x, eps=np.float32(1e-5))
    ll.attention(x, x, x, scale=half)
    ll.sample(x, temperature=np.array(0.5))  # type: ignore[arg-type]
    ll.sample(x, top_p="0.5")  # type: ignore[arg-type]


def own_function(x: ArrayT, gain: Array) -> ArrayT:
    """A user's own step, for arrays of any library."""
    return ll.rms_norm(x, gain * 2 + 1, eps=1e-5)


def wrong_calls(x: Floats, model: ll.Llama) -> None:
    ll.rms_norm([1.0, 2.0], x, eps=1e-5)  # type: ignore[type-var]
    ll.rms_norm(x, "weight", eps=1e-5)  # type: ignore[arg-type]
    ll.rms_norm(x, x)  # type: ignore[call-arg]
    ll.rms_norm(x, x, 1e-5)  # type: ignore[call-arg]
    ll.rms_norm(x=x, weight=x, eps=1e-5)  # type: ignore[call-arg]
    ll.attention(x, x, x, mask=True)  # type: ignore[arg-type]
    ll.apply_rope(x, x, x, layout="Half")  # type: ignore[arg-type]
    ll.qkv_projection(x, x)  # type: ignore[arg-type]
    ll.MLPWeights(x, x, None)  # type: ignore[arg-type]
    ll.forward(model, [[1, 2]])  # type: ignore[arg-type]
    ll.forward("smollm2-135m", x)  # type: ignore[arg-type]
    ll.forward(model, x, tap=["scores"])  # type: ignore[arg-type]
    ll.sample(x, rng="0")  # type: ignore[arg-type]
    ll.load("smollm2-135m", backend="torch")  # type: ignore[arg-type]
