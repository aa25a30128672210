"""docs/benchmarks/gpu.py, whose parts run on the stand-in here and with tiny models."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from llama_layers.bench import engines
from llama_layers.bench import gpu as machine
from llama_layers.bench.cost import Cost
from llama_layers.bench.result import Case, Limit, Result
from tests.support import cupy_stand_in as stand_in
from tests.support import tiny
from tests.support.emulator import needs_compiler
from tests.support.fake_cublas import replaced
from tests.support.installed import installed

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "benchmarks"))
import gpu
import gpu_page
import gpu_questions
from gpu_sizes import Sizes

TINY = Sizes(
    large=tiny.CONFIG, grouped=replace(tiny.CONFIG, num_key_value_heads=1), small=tiny.TIED,
    contexts=(2, 5), prompt=6, rounds=1, tokens=2, rows=12, copies=2, replays=3, repeats=2,
    endurance=20, uploaded=1 << 13, part=1 << 10,
)  # fmt: skip


@pytest.fixture
def on_the_stand_in(monkeypatch):
    for name, value in (("COPIED", 1 << 10), ("SQUARE", 8)):
        monkeypatch.setattr(machine, name, value)
    monkeypatch.setattr(engines, "torch_sees_a_gpu", lambda: False)
    # Other tests' arrays may still be there, and go meanwhile.
    monkeypatch.setattr(stand_in.MemoryPool, "total_bytes", lambda _: 0)
    with installed(), replaced():
        yield


@pytest.mark.emulated
@needs_compiler
@pytest.mark.parametrize("name", gpu.PARTS)
def test_parts(name, on_the_stand_in):
    """Each runs to its end, and the page shows what it found."""
    found = json.loads(json.dumps(gpu.PARTS[name].measure(TINY)))
    gpu.free_memory()
    text = gpu_page.page({name: found})
    if name in gpu_page.GOALS:
        assert found["numbers"].keys() == {"llama_layers"}
        assert found["left_out"]  # torch finds no GPU, or is not there
        assert f"### {name}\n\n{found['title']}" in text
    if (key := gpu_page.ZEROS.get(name)) is not None:
        assert f"| {name} |  | {key} | 0 | 0 | met |" in text


@pytest.mark.emulated
@needs_compiler
def test_answers(on_the_stand_in):
    """What the stand-in answers is known: its work takes a millisecond, its sums have one order."""
    rows = gpu_questions.few_rows(TINY)
    # Two weights of 96 rows of 32 numbers in 2 ms; a copy of 1 KiB, read and written, in one.
    assert rows["copy, GB/s"] == pytest.approx(2048 / 1e-3 / 1e9)
    assert rows["cuBLAS, 2 rows, share of the copy"] == pytest.approx(
        2 * 96 * 32 * 2 / 2e-3 / 2048e3
    )
    found = gpu_questions.repeatability(TINY)
    assert [found[key] for key in found if key.startswith("that differ")] == [0, 0, "0"]
    assert found["same of the kernel"] == list(range(1, 9))
    products = gpu_questions.matmul_of_cupy(TINY)
    assert products["3-D, bfloat16"].startswith("AssertionError: CuPy would copy the operands")
    assert products["ours"]["TFLOP/s"] == pytest.approx(2 * 12 * 32**2 / 1e-3 / 1e12)
    assert set(gpu_questions.bfloat16(TINY).values()) == {"works"}
    assert gpu_questions.uploads(TINY)["right"]


@pytest.mark.emulated
@needs_compiler
def test_an_engine_that_fails_leaves_ours(on_the_stand_in, monkeypatch):
    monkeypatch.setattr(gpu, "check_engines", lambda *_: None)
    others = engines.other_engines()
    monkeypatch.setitem(others, "transformers", others["llama.cpp"])
    module = importlib.import_module(others["llama.cpp"].module)
    monkeypatch.setattr(module, "engine", mock.Mock(side_effect=OSError("no room")))
    found = gpu.PARTS["prefill_large"].measure(TINY)
    assert found["left_out"] == {"transformers": "OSError: no room"}
    assert found["numbers"].keys() == {"llama_layers"}


def test_parts_go_to_other_processes():
    assert pickle.loads(pickle.dumps(gpu.PARTS)).keys() == gpu.PARTS.keys()


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "gpu_problem", lambda: "there is no driver")
    with pytest.raises(SystemExit, match="2"):
        gpu.main([str(tmp_path / "made")])
    assert "error: there is no driver" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.emulated
@needs_compiler
def test_engines_without_memory_are_left_out(on_the_stand_in, monkeypatch):
    monkeypatch.setattr(gpu, "available_on_gpu", lambda: 1000)
    found = gpu.PARTS["decode_large"].measure(TINY)
    assert found["left_out"] == {"transformers": "no memory"}


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    parts = {
        "first": gpu.Part(60, float),
        "dies": gpu.Part(60, os._exit),
        "fails": gpu.Part(60, len),
        "slow": gpu.Part(1, time.sleep),
        "last": gpu.Part(60, str),
    }
    sizes = 30  # instead of sizes: seconds to sleep, the status to die with
    found = gpu.run(parts, sizes, tmp_path, 200)
    assert found == {
        "first": 30.0,
        "dies": {"error": "its process died"},
        "fails": {"error": "TypeError: object of type 'int' has no len()"},
        "slow": {"error": "not done within 1 s"},
        "last": "30",
    }
    (tmp_path / "first.json").write_text('"as it was"')
    again = gpu.run({**parts, "new": gpu.Part(60, str)}, sizes, tmp_path, 0)
    assert again["first"] == "as it was"
    assert again["last"] == "30"
    assert again["new"] == {"error": "no time was left"}


def made(**seconds):
    """Reading 2 MB takes 1 ms."""
    case = Case("S = 1", Cost(2_000_000, 0), None, seconds)
    limits = Limit("reading", [2e9]), Limit("multiplying", [1e9])
    result = Result("Title", None, {}, *limits, dict.fromkeys(seconds, "bfloat16"), [case])
    return {**result.to_json(), "left_out": {}}


def test_goals_are_judged_by_medians():
    # The best of ours are 1 ms; the medians are at 0.8 of the limit, and 0.88 of torch's time.
    part = made(llama_layers=[1e-3, 1.25e-3, 2e-3], torch=[2e-3, 1.1e-3, 1e-3])
    found = {"qkv_few_rows": part, "replays": {"replays that differ": 2}}
    rows = [row for row in gpu_page.goals(found) if row[-1] != "unknown"]
    assert rows == [
        ("qkv_few_rows", "S = 1", "share of reading", "0.90", "0.80", "missed"),
        ("qkv_few_rows", "S = 1", "torch", "1.00", "0.88", "missed"),
        ("replays", "", "replays that differ", "0", "2", "missed"),
    ]
    part = made(llama_layers=[1.1e-3], torch=[1.2e-3])
    judged = [row[-1] for row in gpu_page.goals({"qkv_few_rows": part})][:2]
    assert judged == ["met", "met"]


def test_what_is_not_known_is_not_met():
    part = {**made(llama_layers=[1e-3]), "left_out": {"torch": "finds no GPU"}}
    found = {"qkv_few_rows": part, "endurance": {"error": "its process died"}}
    rows = {row[0]: row for row in gpu_page.goals(found) if row[-1] == "unknown"}
    assert rows["qkv_few_rows"] == ("qkv_few_rows", "", "torch", "1.00", "finds no GPU", "unknown")
    assert rows["endurance"][4:] == ("its process died", "unknown")
    assert rows["prefill_large"][4:] == ("not measured", "unknown")
    assert "its process died" in gpu_page.page(found)
