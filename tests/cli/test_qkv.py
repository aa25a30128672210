"""`llama-layers qkv`: what it prints, writes, draws and refuses."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from tokenizers import models

from llama_layers import LlamaConfig, qkv_projection
from llama_layers.cli import main, qkv, qkv_cases
from llama_layers.verify import examine_qkv
from llama_layers.verify import qkv as qkv_module
from tests.support import tiny

TEXT = "The capital of France is"


def run_json(capsys, *arguments):
    status = main(["qkv", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def small_case_only(monkeypatch):
    """Leave out the case at 7B dimensions, for tests of what does not depend on it."""
    cases = qkv_cases.builtin_cases
    monkeypatch.setattr(qkv_cases, "builtin_cases", lambda *arguments: cases(*arguments)[1:])


def test_builtin_cases_print_the_published_figures(capsys):
    assert main(["qkv"]) == 0
    out = capsys.readouterr().out
    assert "[1, 2, 32, 128]" in out
    assert "Q and K differ in 0 of 8192 elements" in out
    assert "K and V differ in 256 of 256 elements" in out
    assert out.count("A second run gives the same bits.") == 2
    assert "FAIL" not in out


def test_builtin_cases_as_json(capsys):
    status, (large, small) = run_json(capsys)
    assert status == 0
    # The published run printed 0.16539979; float64 gives 0.165399768.
    ramp = (np.sin(np.arange(4096) * 0.0001) * 0.02).astype(np.float32).astype(np.float64)
    exact = ramp.sum() * float(np.float32(0.01))
    for name in "qkv":
        assert large[name]["shape"] == [1, 2, 32, 128]
        assert large[name]["first"] == pytest.approx([exact] * 5, rel=1e-6)
        assert 0.165 <= large[name]["smallest"] <= large[name]["largest"] <= 0.469
        assert large[name]["nonfinite"] == 0
        assert large[name]["judgement"]["verdict"] == "PASS"
    assert large["q_k"] == large["k_v"] == {"differing": 0, "of": 8192}
    assert small["q_k"] == small["k_v"] == {"differing": 256, "of": 256}
    assert large["same_bits"] is small["same_bits"] is True


def test_a_model_and_a_text(smollm2, capsys, tmp_path):
    status, (case,) = run_json(
        capsys, "--model", str(smollm2), TEXT, "--save", str(tmp_path / "out.safetensors")
    )
    assert status == 0
    assert "".join(case["tokens"]) == TEXT
    assert case["q"]["shape"] == [1, 5, 9, 64]
    assert case["k"]["shape"] == case["v"]["shape"] == [1, 5, 3, 64]
    assert case["q_k"]["of"] == 5 * 9 * 64
    assert case["verdicts"] == ["PASS"]
    saved = load_file(tmp_path / "out.safetensors")
    assert {name: array.shape for name, array in saved.items()} == {
        "model.layers.0.input_layernorm": (1, 5, 576),
        "model.layers.0.self_attn.q_proj": (1, 5, 576),
        "model.layers.0.self_attn.k_proj": (1, 5, 192),
        "model.layers.0.self_attn.v_proj": (1, 5, 192),
    }
    q = saved["model.layers.0.self_attn.q_proj"]
    assert q.ravel()[:5].tolist() == case["q"]["first"]
    assert (float(q.min()), float(q.max())) == (case["q"]["smallest"], case["q"]["largest"])


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma3_text", "sliding_window": 2, "num_hidden_layers": 6},
        {"model_type": "smollm3", "num_hidden_layers": 4},
        {"model_type": "olmo2"},
    ],
    ids=lambda changes: changes["model_type"],
)
def test_other_families(tmp_path, capsys, changes):
    """Norms with weights plus 1, RoPE by layer, and no norm before attention."""
    content = tiny.CONFIG.to_json() | changes
    for key in ("rope_parameters", "head_dim"):
        content.pop(key, None)
    config = LlamaConfig.from_json(content)
    tiny.write_single(tmp_path, tiny.arrays(config), config)
    vocabulary = {text: i for i, text in enumerate("ab")}
    tokenizers.Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "tokenizer.json"))
    status, (case,) = run_json(capsys, "--model", str(tmp_path), "abba", "--layer", "1")
    assert status == 0
    assert case["q"]["shape"] == [1, 4, 4, config.head_dim]


def test_a_later_layer_runs_those_before_it(smollm2, capsys):
    _, (first,) = run_json(capsys, "--model", str(smollm2), TEXT)
    status, (later,) = run_json(capsys, "--model", str(smollm2), TEXT, "--layer", "2")
    assert status == 0
    assert later["name"] == "model.layers.2"
    assert later["verdicts"] == ["PASS"]
    assert later["q"]["first"] != first["q"]["first"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_in_another_dtype(smollm2, capsys, dtype):
    assert main(["qkv", "--model", str(smollm2), TEXT, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    activations = "float64" if dtype == "float64" else "float32"
    assert f"Weights in {dtype}, activations in {activations}." in out


def test_a_wrong_projection_fails(monkeypatch, capsys):
    def k_and_v_swapped(x, w):
        q, k, v = qkv_projection(x, w)
        return q, v, k

    monkeypatch.setattr(qkv_module, "qkv_projection", k_and_v_swapped)
    status, (equal, different) = run_json(capsys)
    assert status == 1
    assert equal["verdicts"] == ["PASS"]  # equal weights cannot tell
    assert different["k"]["judgement"]["verdict"] == "FAIL"
    assert different["q"]["judgement"]["verdict"] == "PASS"


def test_other_bits_in_a_rerun_fail(small_case_only, monkeypatch, capsys):
    calls = []

    def last_bit_flickers(x, w):
        calls.append(None)
        return tuple(
            np.nextafter(a, a + len(calls) % 2, dtype=a.dtype) for a in qkv_projection(x, w)
        )

    monkeypatch.setattr(qkv_module, "qkv_projection", last_bit_flickers)
    assert main(["qkv"]) == 1
    assert "A second run gives OTHER BITS." in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture(small_case_only, tmp_path, ending):
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    path = tmp_path / f"q.{ending}"
    assert main(["qkv", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


def refusal(capsys, *arguments):
    """What a refused command says."""
    assert main(["qkv", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_nothing_is_overwritten(small_case_only, capsys, tmp_path):
    for option, name in (("--save", "a.safetensors"), ("--plot", "a.png")):
        path = tmp_path / name
        path.write_text("mine")
        assert f"{path} exists; --force overwrites it" in refusal(capsys, option, str(path))
        assert path.read_text() == "mine"
        assert main(["qkv", option, str(path), "--force"]) == 0
        assert path.read_bytes() != b"mine"
        capsys.readouterr()


def test_refusals(capsys, tmp_path):
    together = "--model and a text go together"
    assert together in refusal(capsys, "--model", "x")
    assert together in refusal(capsys, "some text")
    assert "nope: no such file or directory" in refusal(capsys, "--model", "nope", "text")
    assert "--layer: expected zero or more, got -1" in refusal(
        capsys, "--model", "nope", "text", "--layer", "-1"
    )
    missing = tmp_path / "none" / "q.png"
    assert f"expected {missing.parent} to be an existing directory" in refusal(
        capsys, "--plot", str(missing)
    )
    assert "expected a file, got a directory" in refusal(capsys, "--save", str(tmp_path))
    foo = tmp_path / "q.foo"
    assert f"got {foo}" in refusal(capsys, "--plot", str(foo))
    assert list(tmp_path.iterdir()) == []


def test_one_file_for_two_outputs(capsys, tmp_path):
    path = str(tmp_path / "c.png")
    message = refusal(capsys, "--save", path, "--plot", path)
    assert f"--save and --plot: expected two files, got {path} twice" in message


def test_a_text_that_is_no_unicode(smollm2, capsys):
    message = refusal(capsys, "--model", str(smollm2), "ab\udcff")
    assert "text: expected valid Unicode, got '\\udcff' at position 2" in message


def test_nan_and_inf_are_seen(small_case_only, monkeypatch, capsys):
    def with_a_nan(x, w, **options):
        broken = np.array(x)
        broken[0, 1, 0] = np.nan
        return examine_qkv(broken, w, **options)

    monkeypatch.setattr("llama_layers.verify.examine_qkv", with_a_nan)
    _, (case,) = run_json(capsys)
    assert [case[name]["nonfinite"] for name in "qkv"] == [128, 128, 128]
    assert case["verdicts"] == ["PASS", "WARN"]


def test_numbers_of_any_size_are_told():
    assert qkv._number(0.165399768) == "0.16539977"
    assert qkv._number(-1.64508339e29) == "-1.645083e+29"
    assert qkv._number(2.5e-10) == "2.500000e-10"
    assert qkv._number(0.0) == "0.00000000"


def test_a_layer_that_is_not_there(smollm2, capsys):
    message = refusal(capsys, "--model", str(smollm2), TEXT, "--layer", "30")
    assert message == "llama-layers qkv: --layer: expected a number from 0 to 29, got 30\n"


def test_no_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(
        "llama_layers.backends.placement.gpu_problem", lambda: "CuPy finds no CUDA device"
    )
    message = refusal(capsys, "--backend", "cupy")
    assert message == "llama-layers qkv: backend 'cupy': CuPy finds no CUDA device\n"


def test_auto_takes_numpy_without_a_gpu(small_case_only, monkeypatch, capsys):
    monkeypatch.setattr(
        "llama_layers.backends.cupy.detect.gpu_problem", lambda: "CuPy finds no CUDA device"
    )
    assert main(["qkv", "--backend", "auto"]) == 0
    assert "PASS" in capsys.readouterr().out


def test_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = refusal(capsys, "--plot", str(tmp_path / "q.png"))
    assert "pip install 'llama-layers[plot]'" in message


def test_statistics():
    numbers = np.array([[3.0, -1.0, np.inf], [0.5, 1.5, 2.0]], np.float32)
    assert qkv_module.statistics(numbers) == {
        "smallest": -1.0,
        "largest": 3.0,
        "mean": 1.2,
        "first": [3.0, -1.0, np.inf, 0.5, 1.5],
        "nonfinite": 1,
    }
