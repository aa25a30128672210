"""`llama-layers info --verify`: every body that is here, its verdict, error and speed."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest

from llama_layers.arrays.dispatch import routes
from llama_layers.backends.numpy import BODIES
from llama_layers.backends.trust import Body, settled, trusted
from llama_layers.bench import bodies as speeds
from llama_layers.cli import main, verify_bodies
from llama_layers.layers.norm import normalise
from llama_layers.model.forward import decoder_layers
from tests.support.watched_bodies import forget, spoiled


@pytest.fixture(autouse=True)
def by_numpy(watched, monkeypatch):
    """NumPy's own bodies for two operations, and small prompts to time them."""
    monkeypatch.setattr(verify_bodies, "gpu_problem", lambda: "there is no GPU")
    monkeypatch.setattr(verify_bodies, "compiled_problem", lambda: "needs numba")
    monkeypatch.setattr(speeds, "TOKENS", (4,))
    chosen = {name: BODIES[name] for name in ("normalise", "activations")}
    chain = trusted("numpy", NumPy=chosen)
    with mock.patch.dict(routes("numpy"), chain, clear=True):
        yield chain["NumPy"]


def put(by_numpy, name, function):
    by_numpy[name] = Body("numpy", "NumPy", name, function)


def test_the_table(capsys):
    assert main(["info", "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ("body by verdict serves error/limit speed over definition".split())
    body, route, verdict, serves, error, speed, times = lines[1].split()
    assert (body, route, verdict, serves) == ("normalise", "NumPy", "PASS", "first")
    assert times == "x"
    assert 0 < float(error) <= 1
    assert float(speed) > 0
    assert lines[2].split() == ["activations", "NumPy", "PASS", "first", "0"]
    assert [line.split() for line in lines[3:5]] == [
        ["all", "numba", "not", "here"], ["all", "CUDA", "not", "here"],
    ]  # fmt: skip
    assert lines[5:] == ["numba: needs numba", "CUDA: there is no GPU"]


def test_for_a_program(capsys):
    assert main(["info", "--verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["bodies"]
    assert [(row["body"], row["verdict"]) for row in rows] == [
        ("normalise", "PASS"), ("activations", "PASS"), ("all", "not here"), ("all", "not here"),
    ]  # fmt: skip
    assert 0 < rows[0]["error_over_limit"] <= 1
    assert rows[1]["times_as_fast"] is None


@pytest.mark.parametrize("right", [True, False])
def test_which_body_serves_first(right, capsys):
    """The first that passes, of those that are asked for the same."""
    faster = spoiled(BODIES["normalise"], lambda y, *_: y if right else 2 * y)
    chain = trusted("numpy", faster={"normalise": faster}, NumPy=BODIES)
    with mock.patch.dict(routes("numpy"), chain, clear=True):
        main(["info", "--verify", "--json"])
    rows = json.loads(capsys.readouterr().out)["bodies"]
    found = [(row["route"], row["serves"]) for row in rows if row["body"] == "normalise"]
    assert found == [
        ("faster", "first" if right else None),
        ("NumPy", "next" if right else "first"),
    ]
    assert {row["serves"] for row in rows if row["body"] == "attend"} == {"first"}
    assert {row["serves"] for row in rows if row["body"] == "all"} == {None}


def test_a_wrong_body_and_one_that_raises(by_numpy, capsys):
    def raising(*arguments):
        raise RuntimeError("no such instruction")

    put(by_numpy, "normalise", spoiled(BODIES["normalise"], lambda y, *_: 2 * y))
    put(by_numpy, "activations", raising)
    assert main(["info", "--verify"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 2
    assert "normalise by NumPy: its error is" in out
    assert "activations by NumPy: RuntimeError: no such instruction" in out


def test_what_was_found_counts_from_then_on(by_numpy):
    """In this process and in later ones, though something else was found before."""
    x, weight = np.ones((1, 4), np.float32), np.ones(4, np.float32)
    right = BODIES["normalise"]
    put(by_numpy, "normalise", spoiled(right, lambda y, *_: 2 * y))
    with pytest.warns(RuntimeWarning, match="normalise by NumPy is not used"):
        normalise(np, x, weight, 1e-5)
    put(by_numpy, "normalise", right)
    assert main(["info", "--verify", "--json"]) == 0
    assert settled[right]
    forget()
    normalise(np, x, weight, 1e-5)  # without a warning
    assert settled == {right: True}


@pytest.mark.parametrize("more", ["smollm2-135m", "--tensors"])
def test_bodies_have_nothing_to_do_with_a_model(more, capsys):
    assert main(["info", "--verify", more]) == 2
    assert "--verify: expected no model" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(BODIES))
def test_speeds(name):
    found = speeds.times_as_fast(Body("numpy", "NumPy", name, BODIES[name]))
    assert (found is None) == (name == "activations")
    assert found is None or found > 0


def test_the_speed_of_all_layers_at_once():
    calls = []

    def body(*arguments):
        calls.append(arguments)
        return decoder_layers.__wrapped__(*arguments)

    assert speeds.times_as_fast(Body("numpy", "numba", "decoder_layers", body)) > 0
    assert len(calls) == 1 + speeds.ROUNDS
