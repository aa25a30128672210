"""The fuzzer of public functions: that it finds nothing, and that it would."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import api, api_calls

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("numba") is None, reason="needs the extra fast")
def test_finds_nothing():
    command = [sys.executable, HERE / "api.py", "--seed", "7", "--count", "150"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert (run.stdout, run.returncode) == ("150 calls and no problem\n", 0)


def test_calls_are_the_same_again():
    for seed in range(50):
        first, second = (api_calls.call(np.random.default_rng(seed)) for _ in range(2))
        assert first[0] == second[0]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: np.ones(2), ("gives", [np.ones(2)])),
        (lambda: [(1, None)], ("gives", ["1", "None"])),
        (lambda: int("x"), ("ValueError", "invalid literal for int() with base 10: 'x'")),
        (lambda: len(5), ("TypeError", "object of type 'int' has no len()")),
        (lambda: {}[1], ("wrong exception KeyError", "1")),
        (lambda: Path("/nothing/there").read_text(), ("FileNotFoundError", None)),
    ],
)
def test_outcomes(call, expected):
    how, what = api.outcome(call)
    assert how == expected[0]
    if expected[1] is not None:
        np.testing.assert_equal(what, expected[1])


GIVES = ("f: x", ("gives", [np.float32([1, np.nan]), "1"]))


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (GIVES, None),
        (("f: x", ("gives", [np.float32([1.0002, np.nan]), "1"])), None),
        (("f: x", ("gives", [np.float32([1.1, np.nan]), "1"])), "results differ"),
        (("f: x", ("gives", [np.float32([1, 2]), "1"])), "results differ"),
        (("f: x", ("gives", [np.float64([1, np.nan]), "1"])), "results differ"),
        (("f: x", ("gives", [np.float32([1, np.nan]), "2"])), "results differ"),
        (("f: x", ("gives", [np.float32([1, np.nan])])), "results differ: 2 and 1 parts"),
        (("f: x", ("ValueError", "x: expected y")), "gives with compiled bodies, ValueError"),
        (("f: x", ("wrong exception KeyError", "1")), "wrong exception KeyError without"),
        (("f: x", ("LLAMA_LAYERS_FAST=0: the process died", None)), "the process died without"),
        (("f: x", ("TypeError", "two\nlines")), "TypeError of several lines"),
    ],
)
def test_problems(other, problem):
    found = list(api.problems(GIVES, other))
    assert bool(found) == (problem is not None)
    assert problem is None or any(problem in text for text in found)


def test_a_process_that_dies_is_one_problem(tmp_path, monkeypatch):
    """The next one goes on with the call after."""
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, pickle, sys\n"
        "for seed in range(int(sys.argv[2]), int(sys.argv[3])):\n"
        "    if seed in (2, 4):\n"
        "        os._exit(139)\n"
        "    pickle.dump(('f', ('gives', [])), sys.stdout.buffer)\n"
        "    sys.stdout.buffer.flush()\n"
    )
    monkeypatch.setattr(api, "__file__", str(script))
    hows = [how for _, (how, _) in api.outcomes(0, 6, "1")]
    died = "LLAMA_LAYERS_FAST=1: the process died"
    assert hows == ["gives", "gives", died, "gives", died, "gives"]
