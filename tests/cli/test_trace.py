"""`llama-layers trace`, on small models."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import load
from llama_layers.verify import Trace, record
from tests.support import tiny
from tests.support.commands import IDS, NAMES, trouble


def test_a_trace_holds_every_site(run, port, checkpoint):
    trace = Trace.load(port)
    expected = record(load(checkpoint), np.array([[1, 2, 3, 4, 5]]))
    assert sorted(trace.arrays) == sorted(NAMES)
    for name in NAMES:
        assert np.array_equal(trace.arrays[name], expected.arrays[name]), name
    assert trace.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert trace.metadata["model"] == str(checkpoint)
    assert trace.metadata["dtype"] == "float32"
    assert run("trace", "--ids", IDS, "-o", port, "--force")[1] == (
        f"{port}: 33 sites of 5 tokens in float32, {port.stat().st_size / 2**20:.1f} MiB\n"
    )


def test_a_trace_of_some_sites(run, tmp_path):
    path = tmp_path / "some.safetensors"
    status, out, _ = run(
        "trace", "--ids", IDS, "-o", path, "--sites", "q_proj,mlp.*", "--layers", "1",
        *("--dtype", "float64", "--json"),
    )  # fmt: skip
    assert status == 0
    content = json.loads(out)
    roles = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.act", "mlp.down_proj")
    assert set(content["sites"]) == {f"model.layers.1.{role}" for role in roles}
    assert content["sites"]["model.layers.1.mlp.act"] == [1, 5, 14]
    assert content["bytes"] == path.stat().st_size
    assert content["input_ids"] == [1, 2, 3, 4, 5]
    trace = Trace.load(path)
    assert set(trace.arrays) == set(content["sites"])
    assert trace.arrays["model.layers.1.mlp.act"].dtype == np.float64


def test_a_trace_of_scores_and_probabilities(run, tmp_path):
    path = tmp_path / "pairs.safetensors"
    sites = "q_rope,k_rope,scores,*.probabilities"
    status, _, _ = run("trace", "--ids", IDS, "-o", path, "--sites", sites, "--layers", "1")
    assert status == 0
    q, k, scores, p = (
        Trace.load(path).arrays[f"model.layers.1.self_attn.{name}"].astype(np.float64)
        for name in ("q_rope", "k_rope", "scores", "probabilities")
    )
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    expected = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[3])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    e = np.exp(expected) * np.tri(5)
    np.testing.assert_allclose(p, e / e.sum(axis=-1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_a_trace_of_a_text(run, tmp_path):
    config = replace(tiny.CONFIG, vocab_size=12)
    model = tiny.write_gguf(
        tmp_path / "model.gguf", tiny.arrays(config), config, metadata=tiny.TOKENIZER.items()
    )
    path = tmp_path / "text.safetensors"
    status, out, err = run("trace", "ab 12", "-o", path, "--model", model)
    assert (status, err) == (0, "")
    trace = Trace.load(path)
    assert trace.input_ids.tolist() == [load(model).tokenizer.encode("ab 12")]
    assert trace.metadata.get("text") == "ab 12"
    assert f"of {trace.input_ids.size} tokens" in out


def test_trace_refuses(run, tmp_path, port):
    path = tmp_path / "new.safetensors"
    both = "llama-layers trace: text: expected a text or --ids, and not both\n"
    assert trouble(run, "trace", "a text", "--ids", IDS, "-o", path) == both
    assert trouble(run, "trace", "-o", path) == both
    assert "layers: expected numbers from 0 to 1, got 2" in trouble(
        run, "trace", "--ids", IDS, "-o", path, "--layers", "0-2"
    )
    for layers in ("0-99999999999", "1-999999999999999999"):  # refused before they are expanded
        assert "layers: expected numbers from 0 to 1, got 2" in trouble(
            run, "trace", "--ids", IDS, "-o", path, "--layers", layers
        )
    assert "got 'q_prj', which names none (is it 'q_proj'?)" in trouble(
        run, "trace", "--ids", IDS, "-o", path, "--sites", "q_prj"
    )
    assert "expected ids from 0 to 12" in trouble(run, "trace", "--ids", "1,13", "-o", path)
    assert "to be an existing directory" in trouble(
        run, "trace", "--ids", IDS, "-o", tmp_path / "none" / "a"
    )
    before = port.read_bytes()
    assert f"{port} exists; --force overwrites it" in trouble(
        run, "trace", "--ids", "1", "-o", port
    )
    assert port.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [port]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--layers", value) for value in ("1-", "a", "3-1", "0,3-1", "9" * 5000)),
        *(("--ids", value) for value in ("1,,2", "a", "99999999999999999999", "9" * 5000)),
    ],
)
def test_trace_refuses_what_is_no_list(run, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        run("trace", "-o", "x.safetensors", option, value)
    assert f"argument {option}: expected" in capsys.readouterr().err
