"""What is measured: random weights, layers that fit, and a GGUF file for llama.cpp."""

from dataclasses import replace

import numpy as np
import pytest

from llama_layers import LlamaConfig
from llama_layers.bench import job, models
from llama_layers.checkpoint import expected_tensors
from tests.support import tiny
from tests.support.random_models import GQA


def sizes(model):
    return {name: array.shape for name, array in tiny.all_arrays(model).items()}


@pytest.mark.parametrize("config", [GQA, replace(GQA, tie_word_embeddings=True)])
def test_random_weights_are_those_of_the_config(config):
    model = models.random_model(config, "bfloat16", 3, 1)
    assert sizes(model) == expected_tensors(replace(config, num_hidden_layers=3))
    assert {a.dtype.name for a in tiny.all_arrays(model).values()} == {"bfloat16"}


def test_random_matrices_keep_the_size_of_a_row_and_differ():
    weights = models.RandomWeights("float32")
    a, b = weights.matrix(3000, 500), weights.matrix(3000, 500)
    assert np.std(a) == pytest.approx(500**-0.5, rel=0.01)
    # An engine that finds two equal matrices may keep one of them in the cache.
    assert not np.array_equal(a, b)


def test_as_many_layers_as_fit():
    # Embedding and head 2 * 13 * 10, norm 10, and 1 layer, in float32.
    layer = 10 * 32 + 160 + 3 * 140 + 20
    first = 4 * (2 * 130 + 10 + layer)
    config = replace(GQA, num_hidden_layers=5)
    for nbytes, count in ((first, 1), (first + 4 * layer - 1, 1), (first + 4 * layer, 2)):
        assert models.layers_that_fit(config, "float32", nbytes) == count
    assert models.layers_that_fit(config, "float32", 10**9) == 5
    with pytest.raises(MemoryError, match="one layer in float32 and the vocabulary take"):
        models.layers_that_fit(config, "float32", first - 1)


def test_every_engine_needs_memory(monkeypatch):
    # As 7B is: 26 GB in float32, of which a layer is 0.81 GB.
    given = []
    monkeypatch.setattr(models, "available_memory", lambda: 1000)
    monkeypatch.setattr(models, "layers_that_fit", lambda c, d, nbytes: given.append(nbytes) or 1)
    for engines in (1, 2):
        models.random_model(GQA, "float32", None, engines)
    assert given == [700, 350]


def test_available_memory_is_some():
    assert 1 << 20 < models.available_memory() < 1 << 50


def test_presets_and_checkpoints(tmp_path):
    assert models.config_of("llama2-7b") == LlamaConfig.llama2_7b()
    assert models.config_of("llama3-1-8b") == LlamaConfig.llama3_1_8b()
    tiny.write_single(tmp_path, tiny.arrays())
    assert models.config_of(str(tmp_path)) == tiny.CONFIG
    with pytest.raises(ValueError, match=r"--model: nothing: expected a directory, .*org/name"):
        models.config_of("nothing")


def test_a_model_of_the_hub(monkeypatch, tmp_path):
    tiny.write_single(tmp_path, tiny.arrays())
    monkeypatch.setattr("llama_layers.checkpoint.open.fetch", lambda name, **_: tmp_path)
    assert models.is_checkpoint("org/name")
    assert models.config_of("org/name") == tiny.CONFIG


def test_the_first_layers_of_a_checkpoint(tmp_path):
    tiny.write_single(tmp_path, tiny.arrays())
    model = models.opened_model(str(tmp_path), "float32", 1)
    expected = {n: a for n, a in tiny.arrays().items() if ".layers.1." not in n}
    tiny.assert_holds(model, expected)
    assert model.config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="--layers: expected at most 2, those of the model, got 3"):
        models.opened_model(str(tmp_path), "float32", 3)


def test_enough_copies_to_be_read_from_memory():
    for backend, enough in job.UNCACHED.items():
        assert job.copies(enough, backend) == job.copies(10 * enough, backend) == 1
        assert job.copies(enough - 1, backend) == 2
        assert job.copies(enough // 10, backend) == 11
        assert job.copies(1, backend) == job.MOST_COPIES
