"""The GGUF file that is written for llama.cpp, and the names in it."""

import importlib
from dataclasses import replace

import gguf
import numpy as np
import pytest

from llama_layers import load
from llama_layers.bench.engines import other_engines
from llama_layers.checkpoint import expected_tensors
from tests.support import random_models, tiny

engines = other_engines()["llama.cpp"].module.rpartition(".")[0]
writer = importlib.import_module(f"{engines}.gguf_writer")


def test_names_in_gguf_are_those_of_its_own_package():
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    for name in expected_tensors(replace(tiny.BIASED, num_hidden_layers=12)):
        assert writer.to_gguf(name) == names.get_name(name, try_suffixes=(".weight", ".bias"))
    with pytest.raises(ValueError, match="name: expected that of a model's tensor, got 'x"):
        writer.to_gguf("x.weight")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED, replace(tiny.CONFIG, head_dim=6)])
def test_gguf_comes_back(tmp_path, config, dtype):
    tiny.write_single(tmp_path, tiny.arrays(config, "float32"), config)
    model = load(tmp_path, dtype=dtype)
    writer.write_gguf(tmp_path / "m.gguf", model)
    found = load(tmp_path / "m.gguf")
    theirs = tiny.all_arrays(found)
    for name, array in tiny.all_arrays(model).items():
        stored = "float32" if array.ndim == 1 else dtype
        assert theirs[name].dtype.name == stored, name
        assert np.array_equal(theirs[name], array.astype(theirs[name].dtype)), name
    for field in ("head_dim", "rope_theta", "rms_norm_eps", "num_key_value_heads", "vocab_size"):
        assert getattr(found.config, field) == getattr(config, field)


def test_gguf_of_other_families_is_refused(tmp_path):
    model = random_models.model_of(tiny.QWEN2, random_models.random_weights(tiny.QWEN2))
    with pytest.raises(ValueError, match=r"expected a Llama without RoPE scaling .* got qwen2"):
        writer.write_gguf(tmp_path / "m.gguf", model)
    assert list(tmp_path.iterdir()) == []
