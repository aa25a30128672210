"""Models from arrays in memory: what is taken as it is, and what is refused with which words."""

from __future__ import annotations

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from llama_layers import CheckpointError, Llama, LlamaConfig, forward, load
from llama_layers.arrays.transfer import to_numpy
from tests.support import tiny
from tests.support.installed import GPUS, gpu


def refused(message):
    return pytest.raises(CheckpointError, match=f"^mapping: .*{message}")


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED, tiny.QWEN2, tiny.BIASED])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", ml_dtypes.bfloat16])
def test_bits_are_kept(config, dtype):
    arrays = tiny.arrays(config, dtype)
    model = Llama.from_state_dict(arrays, config)
    tiny.assert_holds(model, arrays)
    assert model.weights.embed_tokens is arrays["model.embed_tokens.weight"]
    assert (model.weights.lm_head is model.weights.embed_tokens) == config.tie_word_embeddings


def test_the_model_computes_what_a_file_does(tmp_path):
    arrays = tiny.arrays()
    ids = np.array([[3, 1, 4, 1, 5]])
    ours = forward(Llama.from_state_dict(arrays, tiny.CONFIG), ids).logits
    assert np.array_equal(ours, forward(load(tiny.write_single(tmp_path, arrays)), ids).logits)


def test_a_config_as_from_json_takes_it(tmp_path):
    tiny.write_config(tmp_path)
    arrays = tiny.arrays()
    for config in (tiny.CONFIG.to_json(), tmp_path, str(tmp_path / "config.json")):
        assert Llama.from_state_dict(arrays, config).config == tiny.CONFIG
    assert Llama.from_state_dict(arrays, config=tiny.CONFIG).config == tiny.CONFIG


def test_any_array_library():
    device = array_api_strict.Device("device1")
    arrays = {
        name: array_api_strict.asarray(array, device=device)
        for name, array in tiny.arrays(tiny.TIED).items()
    }
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 0.0
    weights = Llama.from_state_dict(arrays, tiny.TIED).weights
    assert weights.norm is arrays["model.norm.weight"]
    fused = weights.layers[1].self_attn.qkv
    assert fused.fused.device == device
    expected = tiny.arrays(tiny.TIED)["model.layers.1.self_attn.k_proj.weight"]
    assert np.array_equal(
        to_numpy(fused.k.to_device(array_api_strict.Device("CPU_DEVICE"))), expected
    )


@pytest.mark.parametrize("kind", GPUS)
def test_cupy(kind):
    with gpu(kind) as cupy:
        arrays = {name: cupy.asarray(a) for name, a in tiny.arrays().items()}
        model = Llama.from_state_dict(arrays, tiny.CONFIG)
        assert model.weights.norm is arrays["model.norm.weight"]
        for name, array in tiny.all_arrays(model).items():
            assert np.array_equal(array.get(), tiny.arrays()[name])


def test_what_changes_no_number_is_ignored():
    arrays = tiny.arrays(tiny.TIED)
    more = {
        "lm_head.weight": arrays["model.embed_tokens.weight"].copy(),
        "model.rotary_emb.inv_freq": np.zeros(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.int64),
    }
    tiny.assert_holds(Llama.from_state_dict(arrays | more, tiny.TIED), arrays)


@pytest.mark.parametrize("change", [lambda a: a + 1, lambda a: a[:-1], lambda a: a.astype("f8")])
def test_a_head_that_is_not_the_embedding(change):
    arrays = tiny.arrays(tiny.TIED)
    arrays["lm_head.weight"] = change(arrays["model.embed_tokens.weight"])
    with refused("lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings"):
        Llama.from_state_dict(arrays, tiny.TIED)


def test_arrays_that_are_not_those_of_the_config():
    name = "model.layers.1.mlp.up_proj.weight"
    arrays = tiny.arrays()
    without = {key: array for key, array in arrays.items() if key != name}
    with refused(f"do not match the config: 1 missing: {name}$"):
        Llama.from_state_dict(without, tiny.CONFIG)
    with refused("1 missing: .*; 1 unexpected: up$"):
        Llama.from_state_dict(without | {"up": arrays[name]}, tiny.CONFIG)
    with refused(rf"1 of another shape: {name} \(expected \[48, 32\], got \[32, 48\]\)$"):
        Llama.from_state_dict(arrays | {name: arrays[name].T}, tiny.CONFIG)


def test_queries_and_keys_of_different_dtypes():
    name = "model.layers.1.self_attn.k_proj.weight"
    arrays = tiny.arrays()
    arrays[name] = arrays[name].astype(np.float16)
    with refused(f"{name}.* are of different dtypes, float32, float16, float32: convert them"):
        Llama.from_state_dict(arrays, tiny.CONFIG)


def test_values_that_are_not_arrays_of_one_library():
    name, arrays = "model.norm.weight", tiny.arrays()
    for value, message in (
        (None, "expected an array, got NoneType"),
        ([1.0] * 32, "expected an array, got list"),
        (np.ones(32, np.int64), "expected one of the dtypes float16, .*, got int64"),
        (np.ma.ones(32, np.float32), "expected an array of NumPy, .*, got numpy.MaskedArray"),
        (array_api_strict.ones(32), "expected an array of the same library as .*, numpy, got"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: {message}"):
            Llama.from_state_dict(arrays | {name: value}, tiny.CONFIG)


def test_a_mapping_of_another_kind():
    with pytest.raises(TypeError, match=r"mapping: expected names .*model.state_dict\(\).*, got L"):
        Llama.from_state_dict(Llama.from_state_dict(tiny.arrays(), tiny.CONFIG), tiny.CONFIG)
    with pytest.raises(TypeError, match="mapping: expected names that are str, got 3"):
        Llama.from_state_dict({3: np.zeros(1)}, tiny.CONFIG)


def test_a_prefix_and_quantised_weights_are_named():
    arrays = {f"_orig_mod.{name}": a for name, a in tiny.arrays().items()}
    with refused("the names contain '_orig_mod.' .*_orig_mod.model.embed_tokens.w.*: rename .*s$"):
        Llama.from_state_dict(arrays, tiny.CONFIG)
    arrays = {name: a.astype(np.int8) if a.ndim == 2 else a for name, a in tiny.arrays().items()}
    with refused(r"model.embed_tokens.weight: quantised weights \(int8\) are not supported"):
        Llama.from_state_dict(arrays, tiny.CONFIG)


def test_a_wrong_config():
    with pytest.raises(ValueError, match="missing vocab_size"):
        Llama.from_state_dict(tiny.arrays(), {"model_type": "llama"})
    assert isinstance(Llama.from_state_dict(tiny.arrays(), tiny.CONFIG).config, LlamaConfig)


def test_what_is_joined_is_as_writable_as_what_it_is_from():
    arrays = tiny.arrays()
    assert all(a.flags.writeable for a in model_arrays(arrays))
    for array in arrays.values():
        array.flags.writeable = False
    assert not any(a.flags.writeable for a in model_arrays(arrays))


def model_arrays(arrays):
    layer = Llama.from_state_dict(arrays, tiny.CONFIG).weights.layers[0]
    return [array for array in layer.arrays().values() if array is not None]
