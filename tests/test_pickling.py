"""Models, weights, caches, traces and reports in other processes, and as deep copies."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import warnings
from dataclasses import replace

import array_api_strict
import joblib
import numpy as np
import pytest

from llama_layers import (
    CheckpointError,
    KVCache,
    Llama,
    LlamaWeights,
    Mask,
    check,
    compare,
    forward,
    load,
    record,
)
from llama_layers.arrays.transfer import to_numpy
from llama_layers.verify import Trace
from tests.support import tiny
from tests.support.random_models import model_of

IDS = np.array([[3, 1, 39, 12]])
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def again(thing, protocol=pickle.HIGHEST_PROTOCOL):
    return pickle.loads(pickle.dumps(thing, protocol))


def written(tmp_path, kind="single", weights=None):
    """A checkpoint of some kind, with the numbers of tiny.CONFIG."""
    weights = weights or tiny.arrays()
    if kind == "gguf":
        return tiny.write_gguf(tmp_path / "model.gguf", weights, metadata=tiny.TOKENIZER)
    if kind == "file":
        return tiny.write_single(tmp_path / "model", weights) / "model.safetensors"
    return {"single": tiny.write_single, "sharded": tiny.write_sharded}[kind](
        tmp_path / "model", weights
    )


KINDS = ["single", "file", "sharded", "gguf"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_pickled_as_its_path(kind, tmp_path):
    model = load(written(tmp_path, kind))
    forward(model, IDS)  # so that all weights are read
    for protocol in PROTOCOLS:
        pickled = pickle.dumps(model, protocol)
        assert len(pickled) < 3000 < model.weights.embed_tokens.nbytes
        found = pickle.loads(pickled)
        tiny.assert_holds(found, tiny.arrays())
        assert found.config == model.config
        assert found.generation_config == model.generation_config
        assert not np.shares_memory(found.weights.embed_tokens, model.weights.embed_tokens)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float16"}, {"layers": [1]}, {"backend": array_api_strict}, {"backend": np}],
    ids=lambda options: next(iter(options)),
)
def test_it_is_loaded_as_it_was(options, tmp_path):
    model = load(written(tmp_path), **options)
    for found in (again(model), copy.deepcopy(model)):
        assert type(found.weights.norm) is type(model.weights.norm)
        assert found.weights.norm.dtype == model.weights.norm.dtype
        layer, expected = found.weights.layers[1].named(), model.weights.layers[1].named()
        for name, array in expected.items():
            assert np.array_equal(to_numpy(layer[name]), to_numpy(array)), name
        if "layers" in options:
            with pytest.raises(CheckpointError, match="layer 0: not loaded"):
                found.weights.layers[0]


def test_a_relative_path_is_found_from_anywhere(tmp_path, monkeypatch):
    written(tmp_path)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = load("model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for found in (again(model), copy.deepcopy(model), model):
        tiny.assert_holds(found, tiny.arrays())
        assert found.generation_config["eos_token_id"] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_changed_since_are_refused(kind, tmp_path):
    pickled = pickle.dumps(load(written(tmp_path, kind)))
    path = written(tmp_path, kind, tiny.arrays(seed=1))
    with pytest.raises(CheckpointError, match=rf"^{path} has changed since the model was pickled"):
        pickle.loads(pickled)
    written(tmp_path, kind)
    tiny.assert_holds(pickle.loads(pickled), tiny.arrays())


@pytest.mark.parametrize("name", tiny.arrays())
def test_one_tensor_that_changed_since_is_enough(name, tmp_path):
    pickled = pickle.dumps(load(written(tmp_path)))
    weights = tiny.arrays()
    written(tmp_path, weights=weights | {name: -weights[name]})
    with pytest.raises(CheckpointError, match="has changed"):
        pickle.loads(pickled)


def test_a_config_that_changed_since_is_refused(tmp_path):
    pickled = pickle.dumps(load(written(tmp_path)))
    tiny.write_config(tmp_path / "model", rope_theta=500.0)
    with pytest.raises(CheckpointError, match="has changed"):
        pickle.loads(pickled)


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_gone_are_named(kind, tmp_path):
    path = written(tmp_path, kind)
    model = load(path)
    pickled = pickle.dumps(model)
    path.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=rf"^{path}: no such file or directory; a model that"):
        pickle.loads(pickled)
    tiny.assert_holds(copy.deepcopy(model), tiny.arrays())  # what is mapped stays


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_of_a_loaded_model_copies_no_array(kind, tmp_path):
    model = load(written(tmp_path, kind))
    found = copy.deepcopy(model)
    assert found is not model
    assert np.shares_memory(found.weights.embed_tokens, model.weights.embed_tokens)
    assert not found.weights.embed_tokens.flags.writeable
    tiny.assert_holds(found, tiny.arrays())


def made(source):
    if source == "by hand":
        return model_of(tiny.CONFIG, tiny.arrays())
    if source == "state dict":
        return Llama.from_state_dict(tiny.arrays(), tiny.CONFIG)
    return Llama(tiny.CONFIG, LlamaWeights.from_named(tiny.arrays(), tiny.CONFIG))


@pytest.mark.parametrize("source", ["by hand", "state dict", "named"])
def test_a_model_in_memory_is_pickled_and_copied_by_value(source):
    model = made(source)
    tiny.assert_holds(model, tiny.arrays())
    for found in (*(again(model, protocol) for protocol in PROTOCOLS), copy.deepcopy(model)):
        tiny.assert_holds(found, tiny.arrays())
        found.weights.norm[...] = 0
        found.weights.layers[0].mlp.gate_proj[...] = 0
    tiny.assert_holds(model, tiny.arrays())


def test_a_tied_head_stays_the_embedding(tmp_path):
    weights = tiny.arrays(tiny.TIED)
    loaded = load(tiny.write_single(tmp_path / "model", weights, tiny.TIED))
    changed = replace(loaded, weights=replace(loaded.weights, norm=np.ones(32, np.float32)))
    for model in (loaded, changed, model_of(tiny.TIED, weights)):
        for found in (again(model), copy.deepcopy(model)):
            assert found.weights.lm_head is found.weights.embed_tokens


def test_weights_that_were_replaced_are_kept(tmp_path):
    model = load(written(tmp_path))
    weights = tiny.arrays()
    other = np.full(32, 0.5, np.float32)
    layers = [replace(model.weights.layers[0], input_layernorm=other), model.weights.layers[1]]
    changes = {
        "model.norm.weight": {"norm": other},
        "model.layers.0.input_layernorm.weight": {"layers": layers},
    }
    for name, change in changes.items():
        changed = replace(model, weights=replace(model.weights, **change))
        for found in (again(changed), copy.deepcopy(changed)):
            tiny.assert_holds(found, weights | {name: other})
    wider = replace(model, config=replace(model.config, rope_theta=77.0))
    assert again(wider).config.rope_theta == copy.deepcopy(wider).config.rope_theta == 77.0


def test_an_opened_tokenizer_is_opened_again(tmp_path):
    model = load(written(tmp_path, "gguf"))
    ids = model.tokenizer.encode("ab 12")
    for found in (again(model), copy.deepcopy(model)):
        assert "tokenizer" not in vars(found)
        assert found.tokenizer.encode("ab 12") == ids
        assert again(found.tokenizer).encode("ab 12") == ids


def test_a_function_that_opens_the_tokenizer_may_be_anything(tmp_path):
    model = replace(made("by hand"), open_tokenizer=list)
    assert again(model).tokenizer == []


def test_parts_of_a_model(tmp_path):
    for model in (made("by hand"), load(written(tmp_path))):
        layer = model.weights.layers[0]
        for part in (layer, layer.self_attn, layer.self_attn.qkv, layer.mlp):
            for found in (again(part), copy.deepcopy(part)):
                assert type(found) is type(part)
                assert_equal_arrays(found, part)
        layers = again(model.weights.layers)
        assert_equal_arrays(layers[1], model.weights.layers[1])
        assert_equal_arrays(again(model.weights).layers[1], model.weights.layers[1])


def assert_equal_arrays(found, expected):
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(getattr(found, name), value), name
        elif hasattr(value, "__dict__"):
            assert_equal_arrays(getattr(found, name), value)
        else:
            assert getattr(found, name) == value


@pytest.mark.parametrize("rolling", [None, 2])
def test_a_cache_goes_on_where_it_was(rolling):
    config = replace(tiny.CONFIG, sliding_window=3)
    model = model_of(config, tiny.arrays(config))
    cache = KVCache.create(model, 1, 9, rolling=rolling)
    keep = np.array([[0, 1]])
    for start, mask in ((0, keep), (2, None)):
        ids = IDS[:, start : start + 2]
        cache = forward(model, ids, cache=cache, attention_mask=mask).cache
    copies = [again(cache), copy.deepcopy(cache)]
    expected = forward(model, IDS[:, :1], cache=cache).logits  # which writes into the cache
    for found in copies:
        assert np.array_equal(forward(model, IDS[:, :1], cache=found).logits, expected)


def test_masks_and_outputs():
    mask = Mask(np.arange(3), np.arange(3), window=2)
    output = forward(made("by hand"), IDS)
    for found in (again(mask), copy.deepcopy(mask)):
        assert np.array_equal(found.rows(0, 3), mask.rows(0, 3))
    assert np.array_equal(again(output).logits, output.logits)


def test_a_trace_is_pickled_by_value(tmp_path):
    trace = record(made("by hand"), IDS)
    trace.save(tmp_path / "trace.safetensors")
    np.savez(tmp_path / "trace.npz", **trace.arrays, input_ids=IDS)
    for file in (None, "trace.safetensors", "trace.npz"):
        given = trace if file is None else Trace.load(tmp_path / file)
        found = [again(given), copy.deepcopy(given)]
        if file is not None:
            (tmp_path / file).unlink()
        for one in found:
            assert list(one.arrays) == list(given.arrays)
            assert np.array_equal(one.input_ids, IDS)
            assert one.metadata == given.metadata
            for name, array in trace.arrays.items():
                assert np.array_equal(one.arrays[name], array), name


def test_reports_are_what_they_were():
    model = made("by hand")
    trace = record(model, IDS)
    wrong = Trace(dict(trace.arrays) | {"lm_head": trace.arrays["lm_head"] * np.float32(1.5)}, IDS)
    for report in (check(trace, model), check(wrong, model), compare(trace, wrong)):
        for found in (again(report), copy.deepcopy(report)):
            assert found == report
            assert found.text(every=True) == report.text(every=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_map_the_file_again(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    models = load(written(tmp_path)), made("by hand")
    with multiprocessing.get_context(method).Pool(1) as pool:
        for model in models:
            expected = forward(model, IDS).logits
            assert np.array_equal(pool.apply(forward, (model, IDS)).logits, expected)
            report = pool.apply(check, (record(model, IDS), model))
            assert report.agrees


@pytest.mark.slow
def test_joblib(tmp_path):
    models = load(written(tmp_path)), made("by hand")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of joblib's own, about the machine
        with joblib.Parallel(n_jobs=2, backend="loky") as parallel:
            found = parallel(joblib.delayed(forward)(model, IDS) for model in models)
    for model, output in zip(models, found, strict=True):
        assert np.array_equal(output.logits, forward(model, IDS).logits)
