"""`llama-layers bench`: tiny models from end to end, what is written, and what is refused."""

import json
import sys

import pytest

from llama_layers.bench import cpu, engines
from llama_layers.bench.result import Result
from llama_layers.bench.threads import available_threads
from llama_layers.cli import main
from llama_layers.model.forward import forward
from tests.support import tiny


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    """Nothing is asserted of times, so nobody needs to rest, or the limits to be right."""
    for name, value in (("REST", 0), ("READ_BYTES", 1 << 20), ("SQUARE", 64)):
        monkeypatch.setattr(cpu, name, value)


@pytest.fixture
def model(tmp_path):
    return str(tiny.write_single(tmp_path / "tiny", tiny.arrays()))


def run_json(tmp_path, *arguments):
    path = tmp_path / "bench.json"
    assert main(["bench", *arguments, "--threads", "1", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_qkv(model, tmp_path, capsys):
    content = run_json(tmp_path, "qkv", "--model", model, "--seq", "1,3", "--rounds", "2")
    result = Result.from_json(content)
    assert [case.name for case in result.cases] == ["S = 1", "S = 3"]
    # 4 query, 2 key and 2 value heads of 8, hidden size 32.
    for case, rows in zip(result.cases, (1, 3), strict=True):
        assert case.cost.nbytes == 64 * 32 * 4
        assert case.cost.flops == 2 * rows * 64 * 32
        assert len(case.seconds["llama_layers"]) == 2
    assert result.threads == 1
    assert result.numbers == {"llama_layers": "float32 weights, float32 activations and sums"}
    assert {"processor", "NumPy", "BLAS"} <= result.machine.keys()
    out = capsys.readouterr().out
    title = f"Q, K and V: 32 to 64, float32 weights, 64 copies in turn (sizes of {model}, random "
    assert content["title"] == f"{title}weights)"
    assert out.startswith("Q, K and V: 32 to 64, float32 weights, 64 copies in turn (sizes of")
    assert f"written {tmp_path / 'bench.json'}" in out


def test_a_layer(model, tmp_path, capsys):
    arguments = ("--model", model, "--seq", "2", "--context", "5", "--rounds", "1")
    content = run_json(tmp_path, "layer", *arguments, "--dtype", "bfloat16")
    (case,) = content["cases"]
    # Fused and output projections, MLP, two norms; five cached keys and values of two heads of 8.
    matrices = 64 * 32 + 32 * 32 + 3 * 32 * 48
    assert case["cost"] == {
        "nbytes": 2 * (matrices + 2 * 32) + 5 * 2 * 2 * 8 * 4,
        "flops": 2 * 2 * matrices + 4 * 4 * 8 * (6 + 7),
    }
    assert "bfloat16 weights, 64 copies in turn; one sequence" in content["title"]


def test_decoding(model, tmp_path, capsys):
    arguments = ("--model", model, "--tokens", "4", "--context", "3,9", "--rounds", "2")
    content = run_json(tmp_path, "decode", *arguments)
    assert [(case["name"], case["tokens"]) for case in content["cases"]] == [
        ("after 3 tokens", 1),
        ("after 9 tokens", 1),
    ]
    sizes = [array.size for name, array in tiny.arrays().items() if "embed" not in name]
    token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, bytes
    for case, past in zip(content["cases"], (3, 9), strict=True):
        cached = token * sum(range(past, past + 4)) // 4
        assert case["cost"]["nbytes"] == 4 * (sum(sizes) + 32) + cached
    assert "tokens/s" in capsys.readouterr().out


def test_decoding_several_sequences(model, tmp_path, capsys):
    fed = []

    def watched(model, ids, **options):
        fed.append(ids.shape)
        return forward(model, ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_layers.bench.own_engine.forward", watched)
        options = ("--tokens", "2", "--context", "5", "--rounds", "1", "--batch", "3")
        content = run_json(tmp_path, "decode", "--model", model, *options)
    assert set(fed) == {(3, 4), (3, 1)}
    assert content["cases"][0]["tokens"] == 3
    assert content["title"].endswith(f"3 sequences ({model})")


def test_prefill_of_the_first_layer(model, tmp_path, capsys):
    arguments = ("--model", model, "--seq", "7", "--layers", "1", "--rounds", "1")
    content = run_json(tmp_path, "prefill", *arguments)
    assert content["title"].startswith("Prefill: 1 layer of hidden size 32")
    assert content["title"].endswith(f"one sequence ({model})")
    assert content["cases"][0]["tokens"] == 7


def test_a_published_size(tmp_path, capsys):
    arguments = ("--model", "smollm2-135m", "--dtype", "float16", "--seq", "1", "--rounds", "1")
    content = run_json(tmp_path, "qkv", *arguments)
    assert content["title"] == (
        "Q, K and V: 576 to 960, float16 weights, 64 copies in turn "
        "(sizes of smollm2-135m, random weights)"
    )


@pytest.mark.parametrize("count", [2, 4])
def test_times_are_of_one_token(model, tmp_path, monkeypatch, count):
    passes = [0]

    def counted(*args, **kwargs):
        passes[0] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr("llama_layers.bench.own_engine.forward", counted)
    monkeypatch.setattr(cpu.time, "perf_counter", ticking(passes))
    arguments = ("--model", model, "--tokens", str(count), "--context", "3", "--rounds", "3")
    content = run_json(tmp_path, "decode", *arguments)
    assert content["cases"][0]["seconds"]["llama_layers"] == pytest.approx([1.0] * 3)


def ticking(passes):
    """A clock that a pass moves by a second; and every look at it by a little."""
    looks = [0]

    def clock():
        looks[0] += 1
        return passes[0] + looks[0] * 2.0**-40

    return clock


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture(model, tmp_path, ending):
    path = tmp_path / f"bench.{ending}"
    arguments = ["bench", "qkv", "--model", model, "--seq", "1,2", "--rounds", "1"]
    assert main([*arguments, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])


def refusal(capsys, *arguments):
    """What a refused command says."""
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_nothing_is_overwritten(model, capsys, tmp_path):
    common = ("qkv", "--model", model, "--seq", "1", "--rounds", "1")
    for option, name in (("--json", "a.json"), ("--plot", "a.png")):
        path = tmp_path / name
        path.write_text("mine")
        message = refusal(capsys, *common, option, str(path))
        assert f"{path} exists; --force overwrites it" in message
        assert path.read_text() == "mine"
        assert main(["bench", *common, option, str(path), "--force"]) == 0
        assert path.read_bytes() != b"mine"
        capsys.readouterr()


def test_refusals(model, capsys, tmp_path):
    same = str(tmp_path / "a.png")
    for arguments, message in (
        (("qkv", "--json", same, "--plot", same), "expected two files"),
        (("qkv", "--plot", str(tmp_path / "a.foo")), "--plot: expected a name ending in"),
        (("qkv", "--model", "nothing"), "--model: nothing: expected a directory, a file, org/name"),
        (
            ("qkv", "--against", "nobody"),
            "--against: expected some of torch, onnxruntime, openvino, got 'nobody'",
        ),
        (
            ("decode", "--against", "torch"),
            "--against: torch has no decode here; expected some of transformers, llama.cpp",
        ),
        (("decode", "--model", model, "--layers", "9"), "--layers: expected at most 2"),
        (
            ("qkv", "--threads", "100000"),
            f"--threads: expected at most {available_threads()}, the cores, got 100000",
        ),
    ):
        assert message in refusal(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_engines_that_are_not_installed(model, capsys, monkeypatch):
    there = {"torch", "gguf", "onnx"}
    monkeypatch.setattr(engines, "find_spec", lambda name: name in there or None)
    for kind, name, packages, wanted in (
        ("qkv", "onnxruntime", "onnxruntime", "onnxruntime"),
        ("qkv", "openvino", "openvino", "openvino"),
        ("prefill", "transformers", "transformers", "transformers"),
        ("decode", "llama.cpp", "llama-cpp-python", "llama-cpp-python"),
    ):
        message = refusal(capsys, kind, "--model", model, "--against", name)
        assert message == (
            f"llama-layers bench: --against {name}: {packages} not installed: "
            f"pip install {wanted}\n"
        )
    there.clear()
    assert "onnxruntime and onnx not installed: pip install onnxruntime onnx" in refusal(
        capsys, "qkv", "--model", model, "--against", "onnxruntime"
    )


def test_an_installed_package_is_told_where_engines_are(model, capsys, monkeypatch, tmp_path):
    arguments = ("qkv", "--model", model, "--seq", "1", "--rounds", "1", "--threads", "1")
    monkeypatch.setattr(engines, "CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert refusal(capsys, *arguments, "--against", "copy") == (
        "llama-layers bench: --against: other engines are not part of the installed package; "
        f"expected LLAMA_LAYERS_ENGINES to name docs/benchmarks/engines of a checkout, got "
        f"{tmp_path / 'docs' / 'benchmarks' / 'engines'}\n"
    )
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from llama_layers.bench.engines import OtherEngine\n"
        "ENGINES = {'copy': OtherEngine(('qkv',), {'numpy': 'numpy'}, __name__ + '.copied')}\n"
    )
    (folder / "copied.py").write_text(
        "from dataclasses import replace\n"
        "from llama_layers.bench.own_engine import engine as own\n"
        "def engine(*arguments):\n"
        "    return replace(own(*arguments), name='copy')\n"
    )
    monkeypatch.setenv("LLAMA_LAYERS_ENGINES", str(folder))
    assert main(["bench", *arguments, "--against", "copy"]) == 0
    assert " copy " in capsys.readouterr().out


def test_an_engine_named_twice(model, capsys, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: True)
    message = refusal(capsys, "qkv", "--model", model, "--against", "torch,torch")
    assert "--against: expected each name once, got torch, torch" in message


def test_without_threadpoolctl(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    message = refusal(capsys, "qkv", "--model", model, "--seq", "1")
    assert "bench needs threadpoolctl to set the number of threads: pip install" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qkv", "--seq", "1,0"], "expected a positive integer, got '0'"),
        (["qkv", "--seq", "2,2"], "expected each number once, got '2,2'"),
        (["decode", "--seq", "2"], "unrecognized arguments: --seq 2"),
        (["qkv", "--dtype", "float64"], "invalid choice: 'float64'"),
        ([], "the following arguments are required: KIND"),
    ],
)
def test_usage(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err
