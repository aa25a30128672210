"""Weights from files to the device: every bit, in parts, and nothing left behind by a failure."""

from __future__ import annotations

import gc
import importlib
import io
import weakref
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  # NumPy learns bfloat16 from it
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_layers import CheckpointError, load
from llama_layers.backends.cupy import upload
from llama_layers.backends.cupy.detect import gpu_problem
from llama_layers.checkpoint import open_checkpoint
from tests.support import cupy_memory, tiny
from tests.support import cupy_stand_in as stand_in
from tests.support.installed import stand_in_alone

LOADING = importlib.import_module("llama_layers.checkpoint.load")  # the name is a function too


class Watched:
    """What uploads take of the stand-in: pinned buffers and memory of the device, while alive."""

    def __init__(self, cupy, patch):
        self.pinned, self.memories, self.most_pinned, self.pools_emptied = (
            0,
            weakref.WeakSet(),
            0,
            0,
        )
        watched = self
        assert gpu_problem() is None  # now, since to find out takes work on the device

        class PinnedMemory(cupy.cuda.PinnedMemory):
            def __init__(self, size):
                super().__init__(size)
                watched.pinned += size
                watched.most_pinned = max(watched.most_pinned, watched.pinned)

            def __del__(self):
                assert all(stream.done for stream in cupy.Stream.all), "copied from freed memory"
                watched.pinned -= self.size

        class Memory(cupy.Memory):
            def __init__(self, size):
                super().__init__(size)
                watched.memories.add(self)

        class Pool(cupy.MemoryPool):
            def free_all_blocks(self):
                watched.pools_emptied += 1
                assert not watched.memories, "the pool was emptied while arrays were alive"

        patch.setattr(cupy.cuda, "PinnedMemory", PinnedMemory)
        patch.setattr(cupy_memory, "Memory", Memory)  # where `alloc` finds it
        patch.setattr(cupy, "get_default_memory_pool", Pool)


@pytest.fixture
def watched(cupy, monkeypatch):
    """What uploads take, as far as it can be watched."""
    return Watched(cupy, monkeypatch) if cupy is stand_in else None


@pytest.fixture
def small(monkeypatch):
    """Buffers that hold a few rows of a tiny model, and parts of one."""
    monkeypatch.setattr(upload, "STAGING", 3 << 10)
    monkeypatch.setattr(LOADING, "PART", 1 << 10)


def on_host(model):
    """Its arrays by name, as NumPy's."""
    return {name: array.get() for name, array in tiny.all_arrays(model).items()}


def assert_holds(model, weights):
    found = on_host(model)
    assert found.keys() == weights.keys()
    for name, expected in weights.items():
        assert found[name].dtype == expected.dtype, name
        assert found[name].shape == expected.shape, name
        assert found[name].tobytes() == expected.tobytes(), name


def as_dtype(weights, dtype):
    return {name: array.astype(dtype) for name, array in weights.items()}


def written(directory, form, weights, config):
    if form == "one file":
        return tiny.write_single(directory, weights, config)
    if form == "shards":
        return tiny.write_sharded(directory, weights, config)
    if form == "Meta":
        return tiny.write_single(directory, tiny.meta(weights, config), config)
    directory.mkdir()
    keys = {"attention.key_length": 8, "attention.value_length": 8}
    return tiny.write_gguf(directory / "m.gguf", weights, config, keys=keys)


CONFIGS = st.builds(
    lambda kv, groups, layers, tied, biased: replace(
        tiny.CONFIG,
        num_hidden_layers=layers,
        num_attention_heads=kv * groups,
        num_key_value_heads=kv,
        head_dim=8,
        tie_word_embeddings=tied,
        attention_bias=biased,
        mlp_bias=biased,
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=CONFIGS,
    form=st.sampled_from(["one file", "shards", "Meta", "GGUF"]),
    stored=st.sampled_from(["float32", "float16", "bfloat16"]),
    staging=st.integers(1, 6000),
    part=st.integers(1, 3000),
    seed=st.integers(0, 2**16),
)
def test_every_bit_of_a_random_checkpoint(
    watched, tmp_path_factory, monkeypatch, config, form, stored, staging, part, seed
):
    stored = "float16" if form == "GGUF" and stored == "bfloat16" else stored
    monkeypatch.setattr(upload, "STAGING", staging)
    monkeypatch.setattr(LOADING, "PART", part)
    weights = as_dtype(tiny.arrays(config, seed=seed), stored)
    path = written(tmp_path_factory.mktemp("upload") / "m", form, weights, config)
    assert_holds(load(path, backend="cupy"), weights)


def test_a_buffer_is_not_filled_before_it_was_copied(watched, small, tmp_path):
    weights = tiny.arrays()
    assert_holds(load(tiny.write_single(tmp_path, weights), backend="cupy"), weights)


def test_queries_keys_and_values_are_one_array(watched, small, tmp_path):
    weights = tiny.arrays()
    model = load(tiny.write_sharded(tmp_path, weights), backend="cupy")
    for layer, got in enumerate(model.weights.layers):
        parts = [weights[f"model.layers.{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
        fused = got.self_attn.qkv.fused
        assert fused.flags.c_contiguous
        assert fused.get().tobytes() == np.concatenate(parts).tobytes()


def test_a_tied_head_is_the_embedding(watched, small, tmp_path):
    weights = load(
        tiny.write_single(tmp_path, tiny.arrays(tiny.TIED), tiny.TIED), backend="cupy"
    ).weights
    assert weights.lm_head is weights.embed_tokens
    assert weights.layers[1] is weights.layers[1]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_another_dtype(watched, small, tmp_path, stored, dtype):
    weights = as_dtype(tiny.arrays(), stored)
    model = load(tiny.write_single(tmp_path, weights), backend="cupy", dtype=dtype)
    assert_holds(model, as_dtype(weights, dtype))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_block_formats_become_float32_or_what_is_asked_for(watched, small, tmp_path, dtype):
    kind = gguf.GGMLQuantizationType.Q8_0
    config = replace(tiny.CONFIG, intermediate_size=64)  # blocks are 32 numbers
    weights = tiny.arrays(config)
    path = tiny.write_gguf(tmp_path / "m.gguf", weights, config, quantised=kind)
    expected = {
        name: gguf.dequantize(gguf.quantize(a, kind), kind) if a.ndim == 2 else a
        for name, a in weights.items()
    }
    assert_holds(load(path, backend="cupy", dtype=dtype), as_dtype(expected, dtype or "float32"))


@stand_in_alone
def test_layers_left_out_are_not_uploaded(watched, small, tmp_path):
    weights = tiny.arrays()
    path = tiny.write_single(tmp_path, weights)
    model = load(path, backend="cupy", layers=[1])
    left_out = sum(a.nbytes for name, a in weights.items() if "layers.0." in name)
    assert (
        sum(m.size for m in watched.memories) == sum(a.nbytes for a in weights.values()) - left_out
    )
    assert np.array_equal(
        model.weights.layers[1].mlp.down_proj.get(), weights["model.layers.1.mlp.down_proj.weight"]
    )
    with pytest.raises(CheckpointError, match="layer 0: not loaded"):
        _ = model.weights.layers[0]


@stand_in_alone
def test_main_memory_holds_two_buffers_and_then_nothing(watched, small, tmp_path):
    load(tiny.write_single(tmp_path, tiny.arrays()), backend="cupy")
    gc.collect()
    assert watched.most_pinned == 2 * (3 << 10)
    assert watched.pinned == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_pages_of_the_file_are_let_go(tmp_path):
    config = replace(tiny.CONFIG, vocab_size=99_999)
    checkpoint = open_checkpoint(tiny.write_single(tmp_path, tiny.arrays(config), config))
    name = "lm_head.weight"
    before = mapped_kib()
    total = checkpoint.read(name).sum()
    assert mapped_kib() - before > 8 << 10  # of 12.2 MiB
    checkpoint.forget(name)
    assert mapped_kib() - before < 1 << 10
    assert checkpoint.read(name).sum() == total


def mapped_kib():
    """Main memory that pages of files take in this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def test_all_tensors_are_let_go(watched, small, tmp_path, monkeypatch):
    forgotten = set()
    monkeypatch.setattr(
        "llama_layers.checkpoint.checkpoint.Checkpoint.forget", lambda _, name: forgotten.add(name)
    )
    weights = tiny.arrays()
    load(tiny.write_single(tmp_path, weights), backend="cupy")
    assert forgotten == weights.keys()


@stand_in_alone
def test_earlier_work_comes_first(watched, small, cupy, tmp_path):
    """CuPy's pool gives out memory that work on the current stream may still use."""
    path = tiny.write_single(tmp_path, tiny.arrays())
    done = []
    cupy.enqueue(lambda: done.append("earlier"))
    load(path, backend="cupy")
    assert done == ["earlier"]


def assert_nothing_is_left(watched):
    gc.collect()
    assert watched.pinned == 0
    assert not watched.memories
    assert watched.pools_emptied == 1


@stand_in_alone
def test_a_number_too_large_fails_at_once_and_leaves_nothing(watched, small, tmp_path):
    weights = tiny.arrays()
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = 1e5
    path = tiny.write_single(tmp_path, weights)
    with pytest.raises(CheckpointError, match=r"up_proj.weight: 100000 is too large for float16"):
        load(path, backend="cupy", dtype="float16")
    assert_nothing_is_left(watched)


@stand_in_alone
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_leaves_nothing(watched, small, cupy, tmp_path, monkeypatch, error):
    path = tiny.write_single(tmp_path, tiny.arrays())
    copy, copies = cupy.cuda.runtime.memcpyAsync, []

    def interrupted(*arguments):
        if len(copies) == 5:
            raise error
        copies.append(arguments)
        copy(*arguments)

    monkeypatch.setattr(cupy.cuda.runtime, "memcpyAsync", interrupted)
    with pytest.raises(error):
        load(path, backend="cupy")
    assert len(copies) == 5
    assert_nothing_is_left(watched)


def must_not_read(*_):
    pytest.fail("a tensor was read")


@stand_in_alone
def test_memory_is_taken_before_anything_is_read(watched, small, cupy, tmp_path, monkeypatch):
    path = tiny.write_single(tmp_path, tiny.arrays())
    empty, made = cupy.empty, []

    def full(*arguments):
        made.append(arguments)
        if len(made) == 7:
            raise MemoryError("Out of memory allocating 1 byte")
        return empty(*arguments)

    monkeypatch.setattr(cupy, "empty", full)
    monkeypatch.setattr("llama_layers.checkpoint.checkpoint.Checkpoint.read_part", must_not_read)
    with pytest.raises(MemoryError, match="Out of memory"):
        load(path, backend="cupy")
    assert_nothing_is_left(watched)


def test_progress_counts_every_byte(watched, small, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    done = []

    class Bar:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_task(self, what, total):
            done.append(total)

        def advance(self, task, count):
            done.append(count)

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setattr("rich.progress.Progress", Bar)
    weights = tiny.arrays()
    load(tiny.write_single(tmp_path, weights), backend="cupy", dtype="float64")
    total, *steps = done
    assert total == sum(steps) == sum(2 * a.nbytes for a in weights.values())
    assert max(steps) <= 3 << 10


def test_numpy_reads_nothing_before_it_is_used(tmp_path, monkeypatch):
    path = tiny.write_single(tmp_path, tiny.arrays())
    monkeypatch.setattr("llama_layers.checkpoint.checkpoint.Checkpoint.read_part", must_not_read)
    load(path)
