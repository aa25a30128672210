"""Options of `llama-layers check` that allow what is meant, or take more or less."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from llama_layers.verify import Trace
from tests.support.commands import trouble
from tests.support.random_models import GQA

ROTATED = ("q_proj", "k_proj", "q_rope", "k_rope")


def saved(trace, path, **fields):
    replace(trace, **fields).save(path)
    return path


@pytest.fixture
def interleaved(port, tmp_path):
    """Pairs of half a head apart put next to each other."""
    trace = Trace.load(port)
    arrays = {name: np.array(trace.arrays[name]) for name in trace.arrays}
    for name in (name for name in arrays if name.endswith(ROTATED)):
        halves = arrays[name].reshape(*arrays[name].shape[:2], -1, 2, GQA.head_dim // 2)
        arrays[name] = np.swapaxes(halves, -1, -2).reshape(arrays[name].shape)
    return saved(trace, tmp_path / "interleaved.safetensors", arrays=arrays)


@pytest.fixture
def parts(port, tmp_path):
    """The first tokens of a trace, and the rest."""
    trace, paths = Trace.load(port), []
    for name, part in (("past", slice(None, -1)), ("step", slice(-1, None))):
        arrays = {n: np.array(trace.arrays[n])[:, part] for n in trace.arrays}
        tokens = {"input_ids": trace.input_ids[:, part], "positions": trace.positions[..., part]}
        paths.append(saved(trace, tmp_path / f"{name}.safetensors", arrays=arrays, **tokens))
    return paths


def test_a_layout(run, interleaved):
    status, out, err = run("check", interleaved)
    assert (status, err) == (1, "")
    said = " ".join(out.split())
    assert "If that is meant: --rope-layout interleaved (" in said
    assert "leaves no failing site." in said
    status, out, _ = run("check", interleaved, "--json")
    (remedy,) = json.loads(out)["remedies"]
    assert remedy["option"] == "--rope-layout interleaved"
    assert (remedy["left"], remedy["tried"]) == (0, 33)
    assert run("check", interleaved, "--rope-layout", "interleaved")[0] == 0


def test_allowed_roundings(run, port):
    status, out, err = run("check", port, "--allow", "cache=float16,scores")
    assert (status, err) == (0, "")
    assert "with the roundings of cache=float16, scores." in " ".join(out.split())
    assert "allow: expected a format" in trouble(run, "check", port, "--allow", "cache")


def test_a_decode_step(run, parts):
    past, step = parts
    status, out, err = run("check", step)
    assert (status, err) == (0, "")
    said = " ".join(out.split())
    assert "the keys and values of the past are missing" in said
    assert said.startswith("PASS: 31 of 33 sites")
    status, out, err = run("check", step, "--past", past)
    assert (status, err) == (0, "")
    assert out.startswith("PASS: 33 sites")
    assert "no such file" in trouble(run, "check", step, "--past", step.with_name("none"))
    said = trouble(run, "check", past, step, "--tensor-parallel", "--past", past)
    assert "--past: expected none with --tensor-parallel" in said


def test_unknown_names(run, port, tmp_path):
    trace = Trace.load(port)
    arrays = {name: np.array(trace.arrays[name]) for name in trace.arrays}
    more = arrays | {f"model.layers.{i}.mlp.act_fn": np.ones((1, 2)) for i in range(2)}
    path = saved(trace, tmp_path / "more.safetensors", arrays=more)
    assert "--ignore-unknown" in trouble(run, "check", path)
    status, out, err = run("check", path, "--ignore-unknown")
    assert (status, err) == (0, "")
    assert "Left out: 'model.layers.0.mlp.act_fn' (no site: silu(gate) alone" in out
    assert "; and 1 more." in out
    assert "--ignore-unknown" in trouble(run, "compare", path, port)
    assert run("compare", path, port, "--ignore-unknown")[0] == 0
