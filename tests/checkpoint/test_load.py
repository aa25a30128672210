"""How weights are loaded: as views, on demand, cast, and onto which library."""

from __future__ import annotations

import dataclasses
import itertools
import re
from copy import deepcopy

import array_api_strict
import gguf
import ml_dtypes
import numpy as np
import pytest

from llama_layers import CheckpointError, Llama, load
from llama_layers.checkpoint import convert, open_checkpoint
from llama_layers.checkpoint.load import ranges
from tests.support import tiny
from tests.support.installed import GPUS, gpu


@pytest.fixture
def directory(tmp_path):
    return tiny.write_single(tmp_path / "model", tiny.arrays())


def test_numbers_stay_in_the_file(directory):
    checkpoint = open_checkpoint(directory)
    model = Llama(checkpoint.config, load(directory).weights)
    for name, info in checkpoint.tensors.items():
        array = checkpoint.read(name)
        assert np.shares_memory(array, checkpoint.read(name)), name
        assert not array.flags.writeable
        assert array.nbytes == info.nbytes
    assert not model.weights.embed_tokens.flags.owndata
    assert not model.weights.layers[1].mlp.up_proj.flags.owndata


@pytest.mark.parametrize("dtype", [None, "float16", "float64"])
@pytest.mark.parametrize("kind", ["single", "meta", "gguf", "blocks"])
def test_every_array_is_read_only(kind, dtype, tmp_path):
    """Views of the file, and what was joined, permuted or converted, all alike."""
    config = dataclasses.replace(tiny.BIASED, intermediate_size=64)
    weights, path = tiny.arrays(config), tmp_path / "model"
    if kind in ("gguf", "blocks"):
        blocks = gguf.GGMLQuantizationType.Q8_0 if kind == "blocks" else None
        file = path.with_suffix(".gguf")
        model = load(tiny.write_gguf(file, weights, config, quantised=blocks), dtype=dtype)
    else:
        named = tiny.meta(weights, config) if kind == "meta" else weights
        model = load(tiny.write_single(path, named, config), dtype=dtype)
    layer = model.weights.layers[1]
    for name, array in tiny.all_arrays(model).items():
        assert not array.flags.writeable, name
    assert layer.self_attn.qkv.fused.dtype == (dtype or "float32")
    for copied in (layer.mapped(np.array), deepcopy(layer)):
        for name, array in copied.arrays().items():
            if array is not None:
                assert array.flags.writeable, name
                array[...] = 0
    assert layer.mlp.up_proj.any()


def test_adjacent_rows_are_one_view(tmp_path):
    source = tiny.write_single(tmp_path / "source", tiny.arrays(tiny.QWEN2), tiny.QWEN2)
    path = convert(source, tmp_path / "converted")
    checkpoint = open_checkpoint(path)
    for kind in ("weight", "bias"):
        names = [f"model.layers.1.self_attn.{x}_proj.{kind}" for x in "qkv"]
        fused = checkpoint.read_rows(names)
        for name in names:
            assert np.shares_memory(fused, checkpoint.read(name))
    for dtype in (None, "float32"):
        qkv = load(path, dtype=dtype).weights.layers[1].self_attn.qkv
        assert not qkv.fused.flags.owndata
        assert not qkv.bias.flags.owndata


def test_rows_that_lie_apart_are_copied_once(directory):
    layers = load(directory).weights.layers
    assert layers[0].self_attn.qkv.fused.base is None
    assert layers[0] is layers[0]
    assert layers[-1] is layers[1]
    assert [layer is layers[i] for i, layer in enumerate(layers)] == [True, True]
    assert layers[0:1] == [layers[0]]


def test_a_tied_head_is_the_embedding(tmp_path):
    weights = load(tiny.write_single(tmp_path, tiny.arrays(tiny.TIED), tiny.TIED)).weights
    assert weights.lm_head is weights.embed_tokens


def test_a_subset_of_layers(directory):
    layers = load(directory, layers=range(1, 2)).weights.layers
    assert len(layers) == 2
    assert np.array_equal(
        layers[1].input_layernorm, tiny.arrays()["model.layers.1.input_layernorm.weight"]
    )
    with pytest.raises(CheckpointError, match=r"layer 0: not loaded; load\(.*\) asked for 1"):
        layers[0]
    with pytest.raises(CheckpointError, match="layer 0: not loaded"):
        list(layers)
    with pytest.raises(IndexError):
        layers[2]
    with pytest.raises(CheckpointError, match="asked for none"):
        load(directory, layers=[]).weights.layers[0]


@pytest.mark.parametrize("layer", [2, -1])
def test_layers_out_of_range(directory, layer):
    with pytest.raises(ValueError, match=f"layers: expected numbers from 0 to 1, got {layer}"):
        load(directory, layers=[0, layer])


def test_layers_without_end(directory):
    """The first that is out of range ends it, whatever is to come."""
    asked = []

    def layers():
        for layer in itertools.count():
            asked.append(layer)
            yield layer

    with pytest.raises(ValueError, match="layers: expected numbers from 0 to 1, got 2"):
        load(directory, layers=layers())
    assert asked == [0, 1, 2]
    with pytest.raises(ValueError, match="layers: expected numbers from 0 to 1, got 2"):
        load(directory, layers=range(10**18))


def test_a_weight_can_be_replaced(directory):
    weights = load(directory).weights
    other = dataclasses.replace(weights, norm=np.ones(32, np.float32))
    assert np.array_equal(other.norm, np.ones(32))
    assert other.embed_tokens is weights.embed_tokens
    assert other.layers is weights.layers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_casts(directory, dtype):
    expected = {name: a.astype(np.dtype(dtype)) for name, a in tiny.arrays().items()}
    tiny.assert_holds(load(directory, dtype=dtype), expected)
    tiny.assert_holds(load(directory, dtype=np.dtype(dtype)), expected)
    adjacent = convert(directory, directory.with_name("adjacent"))
    tiny.assert_holds(load(adjacent, dtype=dtype), expected)


def test_dtypes_by_their_scalar_types(directory):
    assert load(directory, dtype=np.float16).weights.norm.dtype == np.float16
    assert load(directory, dtype=ml_dtypes.bfloat16).weights.norm.dtype == ml_dtypes.bfloat16


def test_a_dtype_that_holds_no_weights(directory):
    with pytest.raises(ValueError, match=r"dtype: expected one of float16, .*, got 'int8'"):
        load(directory, dtype="int8")


def test_a_number_too_large_for_the_dtype(tmp_path):
    weights = tiny.arrays()
    weights["model.norm.weight"][7] = -1e5
    weights["lm_head.weight"][0, 0] = np.inf
    model = load(tiny.write_single(tmp_path, weights), dtype="float16")
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight: -100000 is too large for float16"
    ):
        _ = model.weights.norm
    assert np.isposinf(model.weights.lm_head[0, 0])  # it was so in the file


def test_any_array_library(directory):
    device = array_api_strict.Device("device1")
    model = load(directory, backend=array_api_strict, device=device)
    embedding = model.weights.embed_tokens
    assert isinstance(embedding, array_api_strict._array_object.Array)
    assert embedding.device == device
    model = load(directory, backend=array_api_strict)
    assert np.array_equal(
        np.asarray(model.weights.layers[1].self_attn.qkv.k),
        tiny.arrays()["model.layers.1.self_attn.k_proj.weight"],
    )


def test_a_module_that_is_no_array_library(directory):
    with pytest.raises(TypeError, match="backend: expected 'numpy', 'cupy' or a module, got <mod"):
        load(directory, backend=dataclasses)


def test_an_unknown_backend(directory):
    with pytest.raises(ValueError, match=r"backend: expected 'numpy', 'cupy' or a .*'tensorflow'"):
        load(directory, backend="tensorflow")


def test_numpy_has_one_device(directory):
    assert load(directory, backend=np, device="cpu").config == tiny.CONFIG
    with pytest.raises(ValueError, match="device: expected None or 'cpu' for NumPy, got 'cuda'"):
        load(directory, device="cuda")


@pytest.mark.parametrize("kind", GPUS)
def test_cupy(directory, kind):
    with gpu(kind) as cupy:
        weights = load(directory, backend="cupy", dtype="bfloat16", device=0).weights
        assert isinstance(weights.norm, cupy.ndarray)
        for name, array in tiny.all_arrays(Llama(tiny.CONFIG, weights)).items():
            expected = tiny.arrays()[name].astype(ml_dtypes.bfloat16)
            assert array.get().tobytes() == expected.tobytes()
        with pytest.raises(ValueError, match="device: expected None or an id from 0 to"):
            load(directory, backend="cupy", device=1000)


def test_no_tokenizer(directory):
    with pytest.raises(CheckpointError, match=r": no tokenizer\.json, so text cannot"):
        _ = load(directory).tokenizer
    with pytest.raises(ValueError, match="tokenizer: this model has none"):
        _ = Llama(tiny.CONFIG, load(directory).weights).tokenizer


@pytest.mark.parametrize("step", [1, 2, 6])
@pytest.mark.parametrize("most", [1, 4, 7, 12, 100])
def test_parts_of_a_tensor_are_whole_steps_and_as_few_as_fit(step, most):
    count = 5 * step
    found = ranges(count, step, most)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in found]
    assert all(size % step == 0 and (size <= most or size == step) for size in sizes)
    assert all(a + b > most for a, b in itertools.pairwise(sizes[:2]))


def test_the_repr_of_a_checkpoint_leaves_out_what_is_long(directory):
    shown = re.findall(r"[(,] ?(\w+)=", repr(open_checkpoint(directory)))
    assert {"path", "format", "config", "ignored_keys", "ignored_tensors"} <= set(shown)
    assert not {"tensors", "maps", "chat_template", "generation_config"} & set(shown)
