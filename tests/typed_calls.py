"""Calls as users write them, for mypy: it accepts them, except where a comment says the error.

Nothing here runs. Mypy reports a comment for an error that it does not find.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Literal, assert_type

import numpy as np
from numpy.typing import NDArray

import llama_layers as ll
from llama_layers import testing, verify
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
    logits, longer = ll.forward(model, ids, cache=cache, tap=tap)
    assert longer is not None
    cache = longer.truncate(1).take([0, -1]).take(np.array([1])).repeat(2).grow(32).copy()
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


def bounds_of_any_library(
    x: Floats, tensor: torch.Tensor, traced: jax.Array, config: ll.LlamaConfig
) -> None:
    bound = verify.linear_bound(tensor, tensor, dtype="bfloat16", profile="transformers")
    assert_type(bound, verify.Bound)
    assert_type(bound.exact, NDArray[np.float64])
    assert_type(bound.ratio(tensor), NDArray[np.float64])
    assert_type(bound.only(bound.limit < 1), verify.Bound)
    assert_type(verify.judge(traced, bound).verdict, Literal["PASS", "WARN", "FAIL"])
    verify.embedding_bound(x, x)
    verify.rms_norm_bound(traced, x, eps=1e-5)
    verify.rms_norm_bound(x, None, eps=1e-5, offset=1)
    verify.rope_bound(x, np.arange(3), config, layout="interleaved")
    verify.swiglu_bound(x, x, silu=True, accumulate="float64")
    verify.geglu_bound(x, x)
    verify.residual_bound(tensor, tensor)
    verify.scores_bound(x, x, scale=0.5)
    verify.softmax_bound(x, mask=np.ones((3, 3), bool))
    verify.probabilities_bound(x, x, scale=0.5)
    verify.weighted_sum_bound(x, x)
    verify.attention_bound(tensor, tensor, tensor, mask=tensor)
    testing.assert_within_bound(tensor, bound)


def a_port(
    model: ll.Llama, ids: NDArray[np.int64], tensors: dict[str, torch.Tensor], w: ll.QKVWeights
) -> bool:
    ours = verify.record(model, ids, sites=["mlp.*"], layers=range(2))
    assert_type(ours.arrays, Mapping[str, Array])
    port = verify.Trace(tensors, input_ids=ids, metadata={"dtype": "bfloat16"})
    report = verify.check(port, model, progress=lambda result: print(result.site.name))
    assert_type(report, verify.Report)
    with ProcessPoolExecutor() as pool:
        verify.check(verify.join_ranks([port, ours], model.config), model, executor=pool)
    assert_type(verify.compare(ours, verify.Trace.load("port.npz")), verify.Comparison)
    assert_type(verify.examine_qkv(tensors["x"], w).results, dict[str, verify.SiteResult])
    testing.assert_matches_reference(tensors, model, input_ids=ids)
    verify.write_html(report, "report.html")
    return report.agrees


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
    ll.KVCache.create(model, 1, 16).truncate("1")  # type: ignore[arg-type]
    ll.KVCache.create(model, 1, 16).take(1)  # type: ignore[arg-type]
    ll.load("smollm2-135m", backend="torch")  # type: ignore[arg-type]
    verify.linear_bound([1.0, 2.0], x)  # type: ignore[arg-type]
    verify.rms_norm_bound(x, x)  # type: ignore[call-arg]
    verify.rope_bound(x, x, model.config, layout="Half")  # type: ignore[arg-type]
    verify.judge("logits", verify.linear_bound(x, x))  # type: ignore[arg-type]
    verify.judge(x, x)  # type: ignore[arg-type]
    verify.Trace(x)  # type: ignore[arg-type]
    verify.Trace({"lm_head": x}, [[1, 2]])  # type: ignore[arg-type]
    verify.record(model, [[1, 2]])  # type: ignore[arg-type]
    verify.check("port.safetensors", model)  # type: ignore[arg-type]
    verify.compare(verify.Trace({}), {"lm_head": x})  # type: ignore[arg-type]
