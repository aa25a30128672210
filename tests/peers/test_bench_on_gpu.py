"""The other engines of a GPU do the same work: torch's on the memory of what stands in for CuPy."""

from __future__ import annotations

import importlib
import json

import pytest

from llama_layers.bench import engines, gpu, job, models
from llama_layers.bench.measure import TOLERANCES
from llama_layers.cli import main
from tests.support import cupy_stand_in as stand_in
from tests.support import tiny
from tests.support.emulator import needs_compiler
from tests.support.fake_cublas import replaced
from tests.support.installed import installed

pytestmark = [
    pytest.mark.peer,
    needs_compiler,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, in its own code
]


def module(name):
    """One of docs/benchmarks/engines."""
    return importlib.import_module(
        f"{engines.other_engines()['torch'].module.partition('.')[0]}.{name}"
    )


@pytest.fixture(autouse=True)
def on_the_stand_in(monkeypatch):
    """Torch is not on the stand-in's streams, so that its work takes no time there."""
    for name, value in (("COPIED", 1 << 10), ("SQUARE", 8)):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(job, "MOST_COPIES", 3)
    monkeypatch.setattr("llama_layers.backends.placement.gpu_problem", lambda: None)
    monkeypatch.setattr(engines, "torch_sees_a_gpu", lambda: True)
    monkeypatch.setattr(
        module("torch_arrays"), "shared", lambda torch, array: torch.from_numpy(array._numbers)
    )
    monkeypatch.setattr(stand_in.cuda, "get_elapsed_time", lambda start, end: 1.0)
    monkeypatch.setattr(
        module("compiled_model"), "COMPILED", {"backend": "eager", "fullgraph": True}
    )
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.05)):
        monkeypatch.setitem(TOLERANCES, dtype, tolerance)
    with installed(), replaced():
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.TIED])
@pytest.mark.parametrize(
    ("arguments", "against"),
    [
        (["qkv", "--seq", "1,3"], "torch"),
        (["layer", "--seq", "1,3", "--context", "2"], "transformers"),
        (
            ["decode", "--context", "1,5", "--tokens", "3", "--batch", "2"],
            "transformers,transformers-compiled",
        ),
        (["prefill", "--seq", "7"], "transformers"),
    ],
)
def test_engines_do_the_same_work(arguments, against, config, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "config_of", lambda name: config)
    monkeypatch.setattr(models, "is_checkpoint", lambda name: False)
    path = tmp_path / "bench.json"
    options = ["--backend", "cupy", "--dtype", dtype, "--rounds", "2", "--json", str(path)]
    assert main(["bench", *arguments, "--against", against, *options]) == 0
    content = json.loads(path.read_text())
    names = {"llama_layers", *against.split(",")}
    assert content["numbers"].keys() == names
    assert [case["seconds"].keys() for case in content["cases"]] == [names] * len(content["cases"])


def test_drawn_tokens_are_those_of_a_pass(tmp_path):
    """Eager and compiled: the likeliest token each time, of the logits of all before."""
    torch = pytest.importorskip("torch")
    weights = models.RandomWeights("float32", "cupy")
    timed = job.ModelJob(weights.model(tiny.CONFIG), "decode", [4], steps=5, batch=2)
    compiled = module("compiled_model")
    for kind in (compiled.Model, compiled._Compiled):
        runner = kind(timed, torch)
        seen = []
        passed = runner.passed

        def watched(model, state, ids, passed=passed, seen=seen):
            seen.append(ids.clone())
            return passed(model, state, ids)

        runner.passed = watched
        for _ in range(2):
            state = runner.feed(runner.start(10), timed.ids[:, :3])[1]
            step = runner.draw(runner.copy(state), timed.ids[:, 3:4], 5)
            for _ in range(5):
                step()
            ids = torch.cat(seen, dim=1)
            seen.clear()
            assert ids.shape == (2, 9)
            with torch.inference_mode():
                whole = runner.model(ids).logits.argmax(-1)
            assert torch.equal(ids[:, 4:], whole[:, 3:-1])
