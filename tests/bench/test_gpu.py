"""A GPU's clock, limits and engines, on the stand-in, whose work takes a millisecond each."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest

from llama_layers import KVCache, forward, generate
from llama_layers.bench import engines, gpu, job, models, own_engine
from llama_layers.bench.gpu import Gpu
from llama_layers.bench.job import ModelJob, QKVJob
from llama_layers.cli import main
from tests.support import cupy_stand_in as stand_in
from tests.support import random_models, tiny
from tests.support.emulator import emulated
from tests.support.fake_cublas import replaced
from tests.support.installed import installed

pytestmark = emulated


@pytest.fixture(autouse=True)
def on_the_stand_in(monkeypatch):
    """Small enough to be quick."""
    for name, value in (("COPIED", 1 << 10), ("SQUARE", 8)):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(job, "MOST_COPIES", 3)
    with installed(), replaced():
        yield


def work(count):
    for _ in range(count):
        stand_in.get_current_stream().enqueue(lambda: None)


def test_the_gpu_is_timed_and_not_python():
    assert Gpu("qkv", "float32").timed(lambda: work(7)) == pytest.approx(7e-3)


def test_asked_again_where_the_gpu_had_to_wait_for_python():
    asked = []

    def slow():
        asked.append(1)
        work(5)
        if len(asked) < 3:  # the GPU is done with all that it was given before Python asks for more
            stand_in.get_current_stream().synchronize()
            work(1)

    assert Gpu("qkv", "float32").timed(slow) == pytest.approx(5e-3)
    assert len(asked) == 3


def test_always_waiting_ends(monkeypatch):
    monkeypatch.setattr(stand_in.Stream, "eager", True)
    assert Gpu("qkv", "float32").timed(lambda: work(2)) == pytest.approx(2e-3)


@pytest.mark.parametrize("kind", ["layer", "decode", "prefill"])
def test_a_user_waits_until_the_gpu_is_idle(kind, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])
    machine, stream = Gpu(kind, "float32"), stand_in.get_current_stream()

    def spend(seconds):
        stream.enqueue(lambda: now.__setitem__(0, now[0] + seconds))

    spend(100)  # what was asked for before is none of the call's
    assert machine.timed(lambda: spend(3)) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_limits(dtype):
    machine = Gpu("decode", dtype)
    machine.probe()
    machine.probe()
    reading, multiplying = machine.reading, machine.multiplying
    # A copy of 1 KiB is read and written in a millisecond, and a product of 8 x 8 takes another.
    assert reading.rates == [2048 / 1e-3] * 6
    assert multiplying.rates == pytest.approx([2 * 8**3 / 1e-3] * 6)
    assert multiplying.what.startswith(f"{dtype} products of 8 x 8")
    np.testing.assert_allclose(
        machine._product.get().astype(np.float64),
        machine._a.get().astype(np.float64) @ machine._b.get().astype(np.float64).T,
        rtol=0.02,
        atol=0.02,
    )


def test_facts():
    facts = Gpu("qkv", "float32").describe()
    assert facts["GPU"] == "stand-in, 4 multiprocessors, compute capability 9.0, 8 GiB"
    assert facts["CUDA"] == "13.0"
    assert facts["CuPy"] == "14.2.0"
    assert {"driver", "processor", "NumPy"} <= facts.keys()


def test_info_names_it(monkeypatch, capsys):
    assert main(["info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["computing"]["GPU"]
    assert said == ("stand-in, 4 multiprocessors, compute capability 9.0, 8 GiB, by CuPy 14.2.0")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_the_same_as_on_a_cpu(dtype):
    here, there = models.RandomWeights(dtype), models.RandomWeights(dtype, "cupy")
    for sizes in ((3, 5), (1200, 1000)):
        on_cpu, on_gpu = here.matrix(*sizes), there.matrix(*sizes)
        assert isinstance(on_gpu, stand_in.ndarray)
        assert on_gpu.dtype == on_cpu.dtype
        assert np.array_equal(on_gpu.get(), on_cpu)


def test_as_much_of_a_model_as_the_gpu_has_memory_for(monkeypatch):
    given = []
    monkeypatch.setattr(models, "layers_that_fit", lambda c, d, nbytes: given.append(nbytes) or 1)
    for count in (1, 3):  # engines, which share the weights
        models.random_model(random_models.GQA, "float32", None, count, "cupy")
    assert given == [int(0.7 * (6 << 30))] * 2


def decoding(batch=1, steps=3, sizes=(2, 6)):
    weights = random_models.random_weights(random_models.GQA, dtype=np.float32)
    model = random_models.model_of(random_models.GQA, weights, stand_in.asarray)
    return ModelJob(model, "decode", list(sizes), steps=steps, batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_continues_from_the_same_tokens_each_time(batch, monkeypatch):
    """As generate does from the whole prompt; what is timed is so many steps, and no other."""
    timed = decoding(batch)
    drawn = []
    monkeypatch.setattr(own_engine, "generate", lambda *a, **k: drawn_by(generate(*a, **k), drawn))
    ready = own_engine.engine(timed, 1, None)
    for size in (2, 6, 2):
        prompt = timed.ids[:, :size]
        cache = KVCache.create(timed.model, batch, size + 6)
        steps = generate(
            timed.model, stand_in.asarray(prompt), max_new_tokens=6, cache=cache, eos_token_id=()
        )
        expected = [step.get().tolist() for step in steps]
        drawn.clear()
        call = ready.prepare(size)
        assert drawn == expected[:3]
        result = call()
        assert drawn == expected
        whole = forward(timed.model, stand_in.asarray(prompt)).logits[:, -1:, :].get()
        assert np.allclose(ready.to_numpy(result), whole, rtol=1e-4, atol=1e-5)


def drawn_by(steps, drawn):
    for step in steps:
        drawn.append(step.get().tolist())
        yield step


def test_a_timed_step_is_one_graph_and_none_is_left_for_later():
    """The GPU is asked for one token ahead, before the time starts and until it ends."""
    timed = decoding(steps=4, sizes=[3])
    call = own_engine.engine(timed, 1, None).prepare(3)
    launched = []
    launch = stand_in.cuda.Graph.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in.cuda.Graph, "launch", lambda *a: launched.append(1) or launch(*a))
        call()
    assert len(launched) == 4


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_products_are_the_same_as_on_a_cpu(dtype, off):
    results = []
    for backend in ("numpy", "cupy"):
        numbers = models.RandomWeights(dtype, backend)
        weights = [numbers.qkv(random_models.GQA) for _ in range(2)]
        ready = own_engine.engine(QKVJob(weights, [1, 3]), 1, None)
        results.append([ready.to_numpy(ready.prepare(size)()) for size in (1, 3)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert on_gpu.dtype == dtype
        np.testing.assert_allclose(on_gpu.astype(np.float32), on_cpu, rtol=off, atol=off)


@pytest.fixture
def model(tmp_path):
    return str(tiny.write_single(tmp_path / "tiny", tiny.arrays()))


KINDS = {
    "qkv": ["--seq", "1,3"],
    "layer": ["--seq", "1,3", "--context", "2"],
    "decode": ["--context", "2,5", "--tokens", "3"],
    "prefill": ["--seq", "7"],
}


def run_json(tmp_path, *arguments):
    path = tmp_path / "bench.json"
    options = ["--backend", "cupy", "--rounds", "2", "--json", str(path)]
    assert main(["bench", *arguments, *options]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_command(kind, model, tmp_path, capsys, monkeypatch):
    # The stand-in has no pinned memory of the kind that uploads take.
    place = models.random_model
    monkeypatch.setattr(
        models, "opened_model", lambda name, dtype, layers, backend, group: place(
            tiny.CONFIG, dtype, layers, 1, backend
        )
    )  # fmt: skip
    content = run_json(tmp_path, kind, "--model", model, *KINDS[kind])
    assert content["threads"] is None
    assert content["numbers"] == {"llama_layers": "bfloat16 weights and activations, float32 sums"}
    assert "GPU" in content["machine"]
    assert all(case["summary"]["llama_layers"]["best"] > 0 for case in content["cases"])
    out = capsys.readouterr().out
    assert "in turns, 2 rounds" in out
    assert "threads" not in out


def test_refusals(model, capsys, monkeypatch):
    monkeypatch.setattr(engines, "torch_sees_a_gpu", lambda: False)
    options = ("--backend", "cupy")
    cases = [
        (("qkv", "--threads", "2"), "--threads: a GPU's cannot be chosen"),
        (
            ("qkv", "--against", "openvino"),
            "--against: openvino has no qkv on a GPU; expected some of torch\n",
        ),
        (("decode", "--against", "llama.cpp"), "--against: llama.cpp has no decode on a GPU"),
        (("decode", "--against", "nobody"), "expected some of transformers, transformers-compiled"),
    ]
    if find_spec("torch"):
        said = f"--against torch: torch {version('torch')} finds no GPU; https://pytorch.org says"
        cases.append((("qkv", "--against", "torch"), said))
    for arguments, message in cases:
        assert main(["bench", *arguments, "--model", model, *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err


def test_an_engine_for_gpus_only_is_refused_on_a_cpu():
    with pytest.raises(
        ValueError,
        match="transformers-compiled has no decode here; expected some of transformers, llama",
    ):
        engines.check_engines(["transformers-compiled"], "decode")
