"""`llama-layers check` and `compare`, on small models."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llama_layers.verify import Trace, record
from tests.support import tiny
from tests.support.commands import IDS, NAMES, trouble
from tests.support.random_models import GQA, model_of, random_weights

ROUNDED = "Weights were rounded to bfloat16, as the trace is; --weights-dtype overrides that."
Q_ROPE = "model.layers.1.self_attn.q_rope"


def spoilt(port, name=Q_ROPE, change=lambda array: array + 1, **fields):
    """The trace with one site changed, in another file."""
    trace = Trace.load(port)
    arrays = dict(trace.arrays) | {name: change(np.array(trace.arrays[name]))}
    path = port.with_name("spoilt.safetensors")
    replace(trace, arrays=arrays, **fields).save(path, force=True)
    return path


def test_a_right_trace_agrees(run, port):
    status, out, err = run("check", port)
    assert (status, err) == (0, "")
    assert out.startswith("PASS: 33 sites; no error is larger than rounding allows\n")
    assert "FAIL" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_wrong_trace_is_found(run, port):
    wrong = spoilt(port)
    status, out, err = run("check", wrong)
    assert (status, err) == (1, "")
    assert out.startswith(f"FAIL: first at {Q_ROPE}: an error that no rounding\n  allows, at [0, 0")
    # Attention was computed from the right queries.
    assert "2 sites fail: self_attn.q_rope in layer 1, self_attn.attention in layer 1." in out
    assert "known here explains it" in out or "Likely cause" in out
    status, out, _ = run("check", wrong, "--no-diagnose")
    assert status == 1
    assert "known here explains it" not in out
    assert "Likely cause" not in out


def test_a_closed_pipe_hides_no_failure(checkpoint, port):
    wrong = spoilt(port)
    command = f"'{sys.executable}' -m llama_layers check '{wrong}' --model '{checkpoint}' | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_read_is_not_written_to(run, port, checkpoint, tmp_path):
    """Neither the trace nor the model, whatever its path is called, nor with --force."""
    alias = tmp_path / "alias"
    alias.symlink_to(checkpoint)
    files = [checkpoint / "model.safetensors", checkpoint / "config.json", alias / "config.json"]
    before = [file.read_bytes() for file in (port, *files)]
    for output in (port, *files):
        message = trouble(run, "check", port, "--html", output, "--force")
        assert message.endswith(f"{output}: expected a file to write, got one that is read here\n")
    for output in files:
        assert "read here" in trouble(run, "trace", "--ids", IDS, "-o", output, "--force")
        assert "read here" in trouble(run, "qkv", "text", "--save", output, "--force")
    assert [file.read_bytes() for file in (port, *files)] == before
    beside = checkpoint / "port.safetensors"
    for _ in range(2):
        assert run("trace", "--ids", IDS, "-o", beside, "--force")[0] == 0
    beside.unlink()


def test_every_site_on_demand(run, port):
    assert "model.layers.1.mlp.up_proj " not in run("check", port)[1]
    lines = run("check", port, "--all")[1].splitlines()
    for name in NAMES:
        assert any(line.split()[:2] == [name, "PASS"] for line in lines), name


@pytest.mark.parametrize("wrong", [False, True])
def test_check_as_json(run, port, wrong):
    status, out, _ = run("check", spoilt(port) if wrong else port, "--json")
    content = json.loads(out)
    assert status == content["exit_status"] == int(wrong)
    assert content["verdict"] == ("FAIL" if wrong else "PASS")
    assert [r["site"]["name"] for r in content["results"]] == NAMES
    failing = [r["site"]["name"] for r in content["results"] if r["verdict"] == "FAIL"]
    assert failing == ([Q_ROPE, "model.layers.1.self_attn.attention"] if wrong else [])


def test_processes_give_the_report_of_one(run, port, monkeypatch):
    wrong = spoilt(port)
    pages = [wrong.with_name(f"{jobs}.html") for jobs in (1, 2)]
    texts, contents = [], []
    for jobs, page in enumerate(pages, start=1):
        status, out, err = run("check", wrong, "--all", "--jobs", jobs, "--html", page)
        assert (status, err) == (1, "")
        texts.append(re.sub(r"in \d+\.\d s|\d\.html", "", out))
        contents.append(re.sub(r"in \d+\.\d s", "", page.read_text(encoding="utf-8")))
    assert texts[0] == texts[1]
    assert contents[0] == contents[1]
    submit = ProcessPoolExecutor.submit
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda self, job: submit(self, os._exit, 9))
    said = "--jobs: one of the processes ended before its work was done: killed, perhaps"
    assert said in trouble(run, "check", port, "--jobs", 2)
    for count in ("0", "-1", "two", "1.5"):
        with pytest.raises(SystemExit):
            run("check", port, f"--jobs={count}")


def test_check_as_a_page(run, port):
    page = port.with_name("report.html")
    status, out, _ = run("check", spoilt(port), "--html", page)
    assert status == 1
    assert out.endswith(f"written {page}\n")
    assert f"first at {Q_ROPE}" in page.read_text(encoding="utf-8")
    page.write_text("mine")
    assert f"{page} exists; --force overwrites it" in trouble(run, "check", port, "--html", page)
    assert page.read_text() == "mine"
    assert run("check", port, "--html", page, "--force")[0] == 0
    assert "PASS" in page.read_text(encoding="utf-8")


def test_check_refuses(run, port, tmp_path):
    assert "nope: no such file" in trouble(run, "check", tmp_path / "nope")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(port.read_bytes()[:-100])
    assert f"{cut}: expected a safetensors file" in trouble(run, "check", cut)
    for content, said in (
        (b"", "got an empty file"),
        (b"a text of some length", "got a file that does not begin as one"),
        (port.read_bytes()[:5], "got one that is cut off: it has 5 bytes, fewer than its header"),
        (port.read_bytes()[:60], "got one that is cut off: it has 60 bytes, fewer than its header"),
    ):
        cut.write_bytes(content)
        assert trouble(run, "check", cut).endswith(f"{cut}: expected a safetensors file, {said}\n")
    array = tmp_path / "arrays" / "model.norm.npy"
    array.parent.mkdir()
    (array.parent / "notes.txt").write_text("no array")
    assert "expected arrays in .npy or .npz files, got none, but notes.txt" in trouble(
        run, "check", array.parent
    )
    for name in ("a.txt", "b.txt", "c.txt"):
        (array.parent / name).touch()
    assert trouble(run, "check", array.parent).endswith("got none, but a.txt, b.txt, c.txt\n")
    array.write_bytes(b"no array")
    assert trouble(run, "check", array.parent).endswith("does not begin as an .npy file\n")
    np.save(array, np.ones(3))
    assert trouble(run, "check", array).endswith(
        "expected a safetensors file, got an .npy file: name the directory that it is in\n"
    )
    assert "no wider than its arrays, which are float32, got float64" in trouble(
        run, "check", port, "--dtype", "float64"
    )
    unknown = tmp_path / "unknown.safetensors"
    Trace({"model.layers.0.mlp.akt": np.ones((1, 5, 14), np.float32)}).save(unknown)
    assert "'model.layers.0.mlp.akt' (is it 'model.layers.0.mlp.act'?)" in trouble(
        run, "check", unknown
    )
    other = tiny.write_single(tmp_path / "other", tiny.arrays())
    assert "expected one of this model, with " in trouble(run, "check", port, "--model", other)
    assert "profile: expected one of " in trouble(run, "check", port, "--profile", "nobody")
    assert "got 'Q4_1'; --weights-dtype overrides it" in trouble(
        run, "check", spoilt(port, metadata={"weights": "Q4_1"})
    )


def test_nothing_to_check_is_trouble(run, tmp_path):
    path = tmp_path / "lone.safetensors"
    Trace({Q_ROPE: np.ones((1, 5, 4, 4), np.float32)}).save(path)
    status, out, _ = run("check", path)
    assert status == 2
    assert out.startswith("NONE: nothing could be checked")


@pytest.fixture
def half(checkpoint, tmp_path):
    """A trace of the float32 model computed with bfloat16 weights, on bfloat16 activations."""
    narrow = {n: a.astype(ml_dtypes.bfloat16) for n, a in random_weights(GQA).items()}
    exact = record(
        model_of(GQA, {n: a.astype(np.float64) for n, a in narrow.items()}),
        np.array([[1, 2, 3, 4, 5]]),
        sites=["embed_tokens", "input_layernorm"],
    )
    q_proj, x = "model.layers.0.self_attn.q_proj", "model.layers.0.input_layernorm"
    arrays = {
        n: a.astype(ml_dtypes.bfloat16) for n, a in exact.arrays.items() if "layers.1" not in n
    }
    product = arrays[x].astype(float) @ narrow[f"{q_proj}.weight"].astype(float).T
    arrays[q_proj] = product.astype(ml_dtypes.bfloat16)
    path = tmp_path / "half.safetensors"
    Trace(arrays, exact.input_ids).save(path)
    return path


def test_a_narrower_port_has_rounded_the_weights(run, half):
    status, out, _ = run("check", half)
    assert status == 0
    assert ROUNDED in out
    assert "weights in\n  bfloat16" in out or "weights in bfloat16" in out
    status, out, _ = run("check", half, "--weights-dtype", "float32", "--json")
    assert json.loads(out)["weights"] == "float32"
    assert status == 1
    first = json.loads(out)["first"]
    assert first["site"]["name"] == "model.layers.0.self_attn.q_proj"
    cause = first["explanations"][0]
    assert cause["name"] == "weights rounded to bfloat16"
    assert "--weights-dtype bfloat16, in Python load(..., dtype='bfloat16')." in cause["detail"]


def test_a_trace_may_say_its_weights(run, half):
    trace = Trace.load(half)
    replace(trace, metadata={"weights": "float32"}).save(half, force=True)
    status, out, _ = run("check", half)
    assert status == 1
    assert ROUNDED not in out
    replace(trace, metadata={"weights": "bfloat16"}).save(half, force=True)
    status, out, _ = run("check", half)
    assert status == 0
    assert ROUNDED not in out


def test_metadata_may_say_that_a_wide_array_is_narrow(run, half):
    trace = Trace.load(half)
    wide = {name: array.astype(np.float32) for name, array in trace.arrays.items()}
    told = replace(trace, arrays=wide, metadata={"dtype": "bfloat16"})
    told.save(half, force=True)
    assert run("check", half)[0] == 0
    replace(told, metadata={}).save(half, force=True)
    assert run("check", half)[0] == 1
    assert run("check", half, "--dtype", "bfloat16")[0] == 0


def test_most_arrays_say_what_the_weights_were_rounded_to(run, half, port):
    """Logits are often float32 where all else is bfloat16; and one bfloat16 array says nothing."""
    trace = Trace.load(half)
    logits = {"lm_head": Trace.load(port).arrays["lm_head"].astype(np.float32)}
    replace(trace, arrays={**logits, **trace.arrays}).save(half, force=True)
    assert ROUNDED in run("check", half)[1]
    wide = Trace.load(port)
    embedding = wide.arrays["model.embed_tokens"].astype(ml_dtypes.bfloat16)
    arrays = {"model.embed_tokens": embedding, **wide.arrays} | {"model.embed_tokens": embedding}
    replace(wide, arrays=arrays, metadata={}).save(port, force=True)
    assert ROUNDED not in run("check", port)[1]


def test_a_checkpoint_of_several_dtypes(run, half, tmp_path):
    weights = random_weights(GQA, dtype=np.float32)
    weights |= {n: a.astype(ml_dtypes.bfloat16) for n, a in weights.items() if "norm" in n}
    model = tiny.write_single(tmp_path / "several", weights, GQA)
    assert ROUNDED in run("check", half, "--model", model)[1]


def test_the_command_has_the_last_word_on_weights(run, half):
    replace(Trace.load(half), metadata={"weights": "float32"}).save(half, force=True)
    for options, expected in ([], "float32"), (["--weights-dtype", "bfloat16"], "bfloat16"):
        assert json.loads(run("check", half, "--json", *options)[1])["weights"] == expected


def lone_gate(port, dtype):
    """A gated product alone, whose silu is rounded to a dtype first."""
    trace = Trace.load(port)
    names = [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "act")]
    gate, up = (trace.arrays[name].astype(dtype).astype(np.float32) for name in names[:2])
    silu = (gate / (1 + np.exp(-gate))).astype(dtype).astype(np.float32)
    arrays = dict(zip(names, (gate, up, silu * up), strict=True))
    return Trace({name: array.astype(dtype) for name, array in arrays.items()})


def test_roundings_of_an_engine(run, port):
    lone_gate(port, ml_dtypes.bfloat16).save(port, force=True)
    status, out, _ = run("check", port)
    assert (status, out[:5]) == (0, "WARN:")
    status, out, _ = run("check", port, "--profile", "transformers")
    assert (status, out[:5]) == (0, "PASS:")
    status, out, _ = run("check", port, "--profile", "llama.cpp")
    assert (status, out[:5]) == (1, "FAIL:")


def test_sums_in_fewer_bits(run, port):
    trace = Trace.load(port)
    x, name = "model.layers.1.input_layernorm", "model.layers.1.self_attn.q_proj"
    weight = random_weights(GQA, dtype=np.float32)[f"{name}.weight"]
    total = np.zeros((1, 5, len(weight)), np.float16)
    for i in range(weight.shape[1]):
        total = (total + trace.arrays[x][..., i, None] * weight[:, i]).astype(np.float16)
    Trace({x: trace.arrays[x], name: total.astype(np.float32)}).save(port, force=True)
    assert run("check", port)[0] == 1
    assert run("check", port, "--accumulate", "float16")[0] == 0
    said = replace(Trace.load(port), metadata={"accumulate": "float16"})
    said.save(port, force=True)
    assert run("check", port)[0] == 0
    assert run("check", port, "--accumulate", "float32")[0] == 1


class Screen(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_progress_is_shown_on_terminals_only(run, port, monkeypatch):
    assert run("check", port)[2] == ""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    assert run("check", port)[0] == 0
    assert "checking sites" in screen.getvalue()


def test_traces_that_agree(run, port, tmp_path):
    exact = tmp_path / "exact.safetensors"
    assert run("trace", "--ids", IDS, "-o", exact, "--dtype", "float64")[0] == 0
    status, out, err = run("compare", exact, port)
    assert (status, err) == (0, "")
    assert out.startswith("AGREE: 33 sites; the largest difference is ")
    assert max(map(len, out.splitlines())) <= 80


def test_traces_that_come_apart(run, port):
    wrong = spoilt(port)
    status, out, _ = run("compare", port, wrong)
    assert status == 1
    assert out.startswith(f"DIVERGE: first at {Q_ROPE}: difference ")
    status, out, _ = run("compare", port, wrong, "--json")
    content = json.loads(out)
    assert status == content["exit_status"] == 1
    assert content["first"]["site"]["name"] == Q_ROPE
    lines = run("compare", port, wrong, "--all")[1].splitlines()
    assert any(line.split()[:2] == [Q_ROPE, "yes"] for line in lines)


def test_compare_as_a_page(run, port):
    page, wrong = port.with_name("report.html"), spoilt(port)
    status, out, _ = run("compare", port, wrong, "--html", page)
    assert status == 1
    assert out.endswith(f"written {page}\n")
    assert f"first at {Q_ROPE}" in page.read_text(encoding="utf-8")
    message = trouble(run, "compare", port, wrong, "--html", page)
    assert f"{page} exists; --force overwrites it" in message
    message = trouble(run, "compare", port, wrong, "--html", wrong, "--force")
    assert f"{wrong}: expected a file to write, got one that is read here" in message
    assert run("compare", port, port, "--html", page, "--force", "--json")[0] == 0
    assert "AGREE" in page.read_text(encoding="utf-8")


def test_compare_refuses(run, port, tmp_path):
    other = tmp_path / "other.safetensors"
    assert run("trace", "--ids", "1,2,3,4,6", "-o", other)[0] == 0
    assert trouble(run, "compare", port, other) == (
        "llama-layers compare: input_ids: expected the same in both traces, got 5 and 6 at [0, 4]\n"
    )
    assert "nope: no such file" in trouble(run, "compare", port, tmp_path / "nope")


def test_log_probabilities_alone(run, port):
    """Of an engine of which nothing else is known."""
    ids = Trace.load(port).input_ids
    recorded = port.with_name("logprobs.safetensors")
    assert run("trace", "--ids", IDS, "--sites", "logprobs", "-o", recorded)[0] == 0
    numbers = Trace.load(recorded).arrays["logprobs"]
    assert numbers.shape == (1, 4)
    paths = [port.with_name(f"{name}.safetensors") for name in ("right", "wrong")]
    for path, factor in zip(paths, (1, 2), strict=True):
        Trace({"token_logprobs": numbers * np.float32(factor)}, ids).save(path, force=True)
    status, out, err = run("check", paths[0])
    assert (status, err) == (0, "")
    assert "our own run in float32 differs from" in out
    assert run("check", paths[1])[0] == 1
    status, out, _ = run("compare", *paths)
    assert status == 1
    assert "KL(the first || the second)" in out
    content = json.loads(run("compare", *paths, "--json")[1])
    assert content["logprobs"]["count"] == numbers.size
