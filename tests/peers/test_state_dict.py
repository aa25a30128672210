"""State dicts of transformers' models, and what transformers reads of files like ours."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from llama_layers import CheckpointError, Llama, forward, load
from llama_layers.arrays.namespaces import namespace
from llama_layers.arrays.transfer import from_numpy, to_numpy
from tests.support import tiny
from tests.support.torch_models import FAMILY, assert_same_weights, random_model

pytestmark = pytest.mark.peer

IDS = torch.arange(20)[None] * 7 % 96


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILY)
def test_logits_of_a_model_in_memory(family, tied):
    peer = random_model(family, tie_word_embeddings=tied).double().eval()
    for arrays in (peer.state_dict(), dict(peer.named_parameters())):
        model = Llama.from_state_dict(arrays, peer.config)
        assert model.config == Llama.from_state_dict(arrays, peer.config.to_dict()).config
        assert_same_weights(model, peer)
        logits = forward(model, IDS).logits
        assert isinstance(logits, torch.Tensor)
        assert logits.requires_grad == arrays["model.norm.weight"].requires_grad
        # float32 tables of RoPE are all that tells transformers' float64 from ours
        torch.testing.assert_close(logits, peer(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_stay_what_they_are(dtype):
    peer = random_model().to(dtype)
    arrays = dict(peer.named_parameters())
    assert all(array.requires_grad for array in arrays.values())
    model = Llama.from_state_dict(arrays, peer.config.to_dict())
    weights = model.weights
    assert weights.norm.data_ptr() == arrays["model.norm.weight"].data_ptr()
    for array in (weights.norm, weights.embed_tokens, weights.layers[0].self_attn.qkv.fused):
        assert array.dtype == dtype
        assert array.requires_grad
    assert_same_weights(model, peer)


def compiled(peer):
    return torch.compile(peer, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "words"),
    [(compiled, "contain '_orig_mod.'"), (torch.nn.DataParallel, "carry the prefix 'module.'")],
)
def test_a_wrapped_model_is_told_by_its_names(wrap, words):
    peer = random_model()
    arrays = wrap(peer).state_dict()
    with pytest.raises(CheckpointError, match=f"the names {words}"):
        Llama.from_state_dict(arrays, peer.config.to_dict())
    prefix = words.split("'")[1]
    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    assert_same_weights(Llama.from_state_dict(arrays, peer.config.to_dict()), peer)


def test_a_module_instead_of_its_state_dict():
    with pytest.raises(TypeError, match=r"model.state_dict\(\) gives them, got LlamaForCausalLM"):
        Llama.from_state_dict(random_model(), tiny.CONFIG)


def test_torch_tensors_of_other_dtypes():
    arrays = {name: torch.from_numpy(a) for name, a in tiny.arrays().items()}
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name}: quantised weights \(float8_e4m3fn\)"):
        Llama.from_state_dict(arrays | {name: arrays[name].to(torch.float8_e4m3fn)}, tiny.CONFIG)
    with pytest.raises(TypeError, match=f"{name}: expected an array of the same library as mo"):
        Llama.from_state_dict(arrays | {name: arrays[name].numpy()}, tiny.CONFIG)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor.to("meta"), "expected a tensor with data, got one on .* meta"),
        (lambda tensor: tensor.to_sparse(), "expected a dense tensor, got .* torch.sparse_coo"),
        (
            lambda tensor: torch.nested.as_nested_tensor([tensor]),
            "expected a dense tensor, got a nested",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_tensors_that_are_no_arrays(change, words, tied):
    model = random_model(tie_word_embeddings=tied)
    state = {name: change(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match=rf"^model.embed_tokens.weight: {words}"):
        Llama.from_state_dict(state, model.config.to_dict())


def test_jax():
    import jax.numpy as jnp

    arrays = {name: jnp.asarray(a, jnp.bfloat16) for name, a in tiny.arrays(tiny.TIED).items()}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 0
    model = Llama.from_state_dict(arrays, tiny.TIED)
    assert model.weights.norm is arrays["model.norm.weight"]
    k = model.weights.layers[1].self_attn.qkv.k
    assert k.dtype == jnp.bfloat16
    assert (k == arrays["model.layers.1.self_attn.k_proj.weight"]).all()


def read_by_both(path, weights):
    """Both read these weights, or the test fails."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    for name, array in weights.items():
        assert np.array_equal(to_numpy(peer.state_dict()[name]), array), name
    tiny.assert_holds(load(path), weights)


def test_the_files_that_transformers_reads(tmp_path):
    weights = tiny.arrays(seed=1)
    path = tiny.write_sharded(tmp_path, tiny.arrays())
    read_by_both(path, tiny.arrays())
    tiny.write_single(path, weights)  # beside the shards
    read_by_both(path, weights)


@pytest.mark.parametrize("extra", ["a name less", "another shard", "more names"])
def test_an_index_that_is_not_exact(tmp_path, extra):
    weights = tiny.arrays()
    tiny.write_sharded(tmp_path, weights)
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = names.pop("model.norm.weight")
    if extra == "another shard":
        names["model.norm.weight"] = next(file for file in names.values() if file != shard)
    elif extra == "more names":
        names |= {"model.norm.weight": shard, "model.rotary_emb.inv_freq": shard}
    tiny.write_index(tmp_path, names)
    read_by_both(tmp_path, weights)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.k_scale"]
)
def test_buffers_that_transformers_does_not_read(tmp_path, name):
    weights = tiny.arrays()
    tiny.write_single(tmp_path, weights | {name: np.full((2, 2), 3, np.float32)})
    read_by_both(tmp_path, weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numbers_of_numpy_as_tensors(dtype):
    numbers = np.array([1.5, -0.0, 2.0**-20], getattr(ml_dtypes, dtype, dtype))
    tensor = from_numpy(numbers, namespace(x=torch.zeros(1)))
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.double().tolist() == numbers.astype(float).tolist()
