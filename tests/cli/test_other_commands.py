"""`llama-layers` itself, `info`, `pull` and `convert`."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llama_layers.backends.numba import detect as compiled
from llama_layers.cli import main
from llama_layers.config.families import FAMILIES
from tests.support import tiny


def test_the_program_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "llama_layers", "--version"], capture_output=True, text=True
    )
    assert run.returncode == 0
    assert run.stdout.startswith("llama-layers ")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["qkv", "--dtype", "int8"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: llama-layers" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error():
    command = f"'{sys.executable}' -m llama_layers qkv | head -1"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("Llama-2 7B dimensions")


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny checkpoint of known size."""
    tiny.write_single(tmp_path / "tiny", tiny.arrays())
    return tmp_path / "tiny"


def test_an_unexpected_error_is_trouble_not_divergence(monkeypatch, capsys):
    def defect(*_):
        raise KeyError("a defect")

    monkeypatch.setattr("llama_layers.checkpoint.open_checkpoint", defect)
    assert main(["info", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a defect in llama_layers, please report it: KeyError: 'a defect'" in said
    monkeypatch.setenv("LLAMA_LAYERS_TRACEBACK", "1")
    assert main(["info", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_is_no_exception(monkeypatch, capsys):
    """As Rust's panics are in Python."""

    class Panic(BaseException):
        pass

    def panic(*_):
        raise Panic("first line\n\x1b[2Jsecond line")

    monkeypatch.setattr("llama_layers.checkpoint.open_checkpoint", panic)
    assert main(["info", "x"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert r"Panic: first line\n\x1b[2Jsecond line" in said


def test_a_warning_is_one_line(monkeypatch, checkpoint):
    """In a process of its own: pytest has ways of its own with warnings."""
    code = (
        "import sys, warnings, llama_layers.checkpoint as c, llama_layers.cli as cli\n"
        "opened = c.open_checkpoint\n"
        "c.open_checkpoint = lambda path: warnings.warn('odd\\nfile') or opened(path)\n"
        "sys.exit(cli.main(['info', sys.argv[1]]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=True
    )
    assert run.stderr == "llama-layers info: warning: odd\\nfile\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_stdout_that_is_full():
    command = f"'{sys.executable}' -m llama_layers pull >/dev/full"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "No space left on device" in run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_a_stderr_that_takes_nothing(stderr):
    command = f"'{sys.executable}' -m llama_layers info no-such-model {stderr}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "")


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def defect(*_):
        raise MemoryError("Unable to allocate 6.82 PiB")

    monkeypatch.setattr("llama_layers.checkpoint.open_checkpoint", defect)
    assert main(["info", "x"]) == 2
    expected = "llama-layers info: not enough memory: Unable to allocate 6.82 PiB\n"
    assert capsys.readouterr().err == expected


def test_without_a_stdout():
    command = f"'{sys.executable}' -m llama_layers pull >&-"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_info_as_json(checkpoint, capsys):
    assert main(["info", str(checkpoint), "--json", "--tensors"]) == 0
    content = json.loads(capsys.readouterr().out)
    sizes = [array.size for array in tiny.arrays().values()]
    assert content["parameters"] == sum(sizes)
    assert content["stored_bytes"] == 4 * sum(sizes)
    assert content["weight_bytes"]["bfloat16"] == 2 * sum(sizes)
    # Two layers, keys and values, two heads of eight, two bytes.
    assert content["cache_bytes_per_token"]["float16"] == 2 * 2 * 2 * 8 * 2
    shapes = {tensor["name"]: tuple(tensor["shape"]) for tensor in content["tensors"]}
    assert shapes == {name: array.shape for name, array in tiny.arrays().items()}


def test_info_prints_each_tensor_on_demand(checkpoint, capsys):
    assert main(["info", str(checkpoint)]) == 0
    short = capsys.readouterr().out
    assert "4 query, 2 key/value, of 8" in short
    assert "model.layers.1.mlp.up_proj.weight" not in short
    assert main(["info", str(checkpoint), "--tensors"]) == 0
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out


def test_info_prints_the_switches(tmp_path, capsys):
    """Those that are not as in Llama."""
    assert main(["info", str(tiny.write_single(tmp_path / "llama", tiny.arrays()))]) == 0
    assert "  switches    none: Llama's block\n" in capsys.readouterr().out
    config = replace(
        tiny.CONFIG,
        model_type="qwen3",
        qk_norm="head",
        sliding_window=8,
        layer_types=("sliding_attention", "full_attention"),
        layer_rope_theta=(10000.0, 0.0),
    )
    path = str(tiny.write_single(tmp_path / "qwen3", tiny.arrays(config), config))
    assert main(["info", path]) == 0
    shown = capsys.readouterr().out
    thetas = "10000 in 1 layer and none in 1 layer"
    assert f"  switches    qk_norm head\n{' ' * 14}layer_rope_theta {thetas}\n" in shown
    assert "64 tokens, sliding window 8 in 1 of 2 layers\n" in shown
    assert main(["info", path, "--json"]) == 0
    switches = json.loads(capsys.readouterr().out)["switches"]
    assert switches == {"qk_norm": "head", "layer_rope_theta": [10000.0, 0.0]}


def test_info_lists_the_keys_that_were_ignored(checkpoint, capsys):
    ignored = {"max_sequence_length": 2048, "a\nb\x1b[2J": 1}
    tiny.write_config(checkpoint, **ignored)
    assert main(["info", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert "  not read    max_sequence_length, a\\nb\\x1b[2J\n" in shown
    assert "\x1b" not in shown
    assert main(["info", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ignored_keys"] == list(ignored)
    tiny.write_config(checkpoint)
    assert main(["info", str(checkpoint)]) == 0
    assert "  not read    none\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "phi"},
            f"model_type: expected one of {', '.join(FAMILIES)}, got 'phi'",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "weights (awq, 4 bits)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "gives no logits"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 changes the maths"),
    ],
)
def test_info_of_what_is_not_supported(checkpoint, capsys, changes, said):
    tiny.write_config(checkpoint, **changes)
    assert main(["info", str(checkpoint)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"llama-layers info: {checkpoint}/config.json: ")
    assert said in line


def test_info_of_what_computes_here(capsys, monkeypatch):
    monkeypatch.setenv("LLAMA_LAYERS_FAST", "0")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"NumPy       {np.__version__}" in shown
    assert "compiled    not in use: switched off by LLAMA_LAYERS_FAST=0" in shown
    monkeypatch.delenv("LLAMA_LAYERS_FAST")
    missing = {"numba": None, "threadpoolctl": None}
    monkeypatch.setattr(compiled, "find_spec", missing.get)
    assert main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["computing"]
    assert content["compiled"] == (
        "not in use: needs numba and threadpoolctl: pip install 'llama-layers[fast]'"
    )
    assert main(["info", "--tensors"]) == 2
    assert "--tensors: expected a model" in capsys.readouterr().err


def test_info_of_nothing(capsys, tmp_path):
    assert main(["info", str(tmp_path)]) == 2
    assert "llama-layers info: " in capsys.readouterr().err


def test_pull_lists_what_is_known(capsys):
    assert main(["pull"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


def test_pull_of_an_unknown_name(capsys):
    assert main(["pull", "gpt-5"]) == 2
    assert "gpt-5" in capsys.readouterr().err


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_convert_promises_nothing_about_a_file_or_another_directory(
    checkpoint, tmp_path, capsys, force
):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("file", "expected a directory to make, got a file"),
        ("empty", "exists and holds no config.json, so it is left alone"),
    ):
        assert main(["convert", str(checkpoint), str(tmp_path / name), *force]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "overwrite" not in said
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_convert(checkpoint, tmp_path, capsys):
    out = tmp_path / "half"
    assert main(["convert", str(checkpoint), str(out), "--dtype", "float16"]) == 0
    written = load_file(out / "model.safetensors")
    for name, array in tiny.arrays().items():
        assert np.array_equal(written[name], array.astype(np.float16))
    assert main(["convert", str(checkpoint), str(out)]) == 2
    assert f"{out} exists; --force overwrites it" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(out), "--force"]) == 0
    for source in (out, out / "model.safetensors"):
        assert main(["convert", str(source), str(out), "--dtype", "float16", "--force"]) == 2
        assert "expected another directory than that of the source" in capsys.readouterr().err
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == np.float32
