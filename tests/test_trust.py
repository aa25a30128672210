"""Bodies are tried before they serve, and what was found is remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest

from llama_layers import trial
from llama_layers.arrays.dispatch import only, routes
from llama_layers.backends import machine, trust
from llama_layers.backends.numpy import BODIES
from llama_layers.backends.trust import Body, settled, takes, trusted
from llama_layers.layers.norm import normalise
from llama_layers.layers.rope import rotate
from llama_layers.testing import assert_same_bits
from tests.support.watched_bodies import (
    DEFINITIONS,
    forget,
    inputs,
    one_warning,
    planted,
    shuffled,
    spoiled,
)


@pytest.mark.parametrize("name", sorted(BODIES))
@pytest.mark.usefixtures("watched")
def test_the_right_ones_serve(name):
    arguments = inputs(name)
    with planted("numpy", "NumPy", name, mock.Mock(wraps=BODIES[name], takes=None)):
        body = routes("numpy")["NumPy"][name].function
        y = DEFINITIONS[name](np, *arguments)
        assert settled == {body: True}
        calls = body.call_count
        assert_same_bits(DEFINITIONS[name](np, *arguments), y)
        assert body.call_count == calls + 1


def test_every_body_is_tried():
    for library in ("numpy", "cupy"):
        for offers in routes(library).values():
            assert set(offers) <= set(trial.OPERATIONS)


@pytest.mark.parametrize("error", [RuntimeError("no such\ninstruction"), ValueError(), KeyError(3)])
@pytest.mark.usefixtures("watched")
def test_a_body_that_raises(error):
    def raising(*arguments):
        raise error

    x = inputs("normalise")
    with planted("numpy", "NumPy", "normalise", raising), one_warning(type(error).__name__):
        y = normalise(np, *x)
    assert_same_bits(y, normalise.__wrapped__(np, *x))


@pytest.mark.usefixtures("watched")
def test_the_next_body_serves():
    """And not the definition, where one is left that is right."""
    second = mock.Mock(wraps=BODIES["normalise"], takes=None)
    wrong = spoiled(BODIES["normalise"], shuffled)
    chain = trusted("numpy", first={"normalise": wrong}, NumPy={"normalise": second})
    with mock.patch.dict(routes("numpy"), chain, clear=True), one_warning("normalise by first"):
        normalise(np, *inputs("normalise"))
    assert settled == {wrong: False, second: True}


@pytest.mark.usefixtures("watched")
def test_a_body_that_raises_later():
    body = mock.Mock(wraps=BODIES["normalise"], takes=None)
    x = inputs("normalise")
    with planted("numpy", "NumPy", "normalise", body):
        normalise(np, *x)
        body.side_effect = RuntimeError("the device is lost")
        with one_warning("RuntimeError: the device is lost"):
            found = [normalise(np, *x) for _ in range(2)]
    for y in found:
        assert_same_bits(y, normalise.__wrapped__(np, *x))


@pytest.mark.usefixtures("watched")
def test_arguments_that_the_definition_refuses_are_no_fault_of_a_body():
    x, weight, eps = inputs("normalise")
    with planted("numpy", "NumPy", "normalise", BODIES["normalise"]):
        expected = normalise(np, x, weight, eps)
        with pytest.raises(ValueError, match="broadcast"):
            normalise(np, x, weight[:3], eps)
        assert_same_bits(normalise(np, x, weight, eps), expected)
    assert settled == {BODIES["normalise"]: True}


@pytest.mark.parametrize("error", [MemoryError, FloatingPointError, RuntimeWarning])
@pytest.mark.usefixtures("watched")
def test_what_is_the_caller_s_is_raised(error):
    body = mock.Mock(wraps=BODIES["normalise"], takes=None)
    with planted("numpy", "NumPy", "normalise", body):
        normalise(np, *inputs("normalise"))
        body.side_effect = error
        with pytest.raises(error):
            normalise(np, *inputs("normalise"))
        body.side_effect = None
        normalise(np, *inputs("normalise"))
    assert settled[body]


@pytest.mark.usefixtures("watched")
def test_a_caller_s_error_state_does_not_count():
    with np.errstate(all="raise"):
        normalise(np, *inputs("normalise"))
    assert settled[routes("numpy")["NumPy"]["normalise"].function]


def tries():
    return mock.patch.object(trial, "try_body", side_effect=trial.try_body)


@pytest.mark.parametrize("right", [True, False])
def test_a_result_is_remembered(watched, monkeypatch, right):
    monkeypatch.setattr(trust, "_is_ours", lambda body: True)
    body = BODIES["normalise"] if right else spoiled(BODIES["normalise"], shuffled)
    x = inputs("normalise")
    with tries() as tried, planted("numpy", "NumPy", "normalise", body):
        for _ in range(3):  # processes
            forget()
            if right:
                normalise(np, *x)
            else:
                with one_warning("normalise by NumPy"):
                    normalise(np, *x)
    assert tried.call_count == 1
    (file,) = (watched / "bodies").iterdir()
    content = json.loads(file.read_text())
    assert content["machine"]["numpy"] == np.__version__
    assert (content["bodies"]["normalise by NumPy"]["problem"] is None) == right


@pytest.mark.usefixtures("watched")
def test_a_result_is_not_that_of_a_body_put_in_by_a_caller():
    x, right = inputs("normalise"), BODIES["normalise"]
    with tries() as tried, planted("numpy", "NumPy", "normalise", right):
        normalise(np, *x)
    assert tried.call_count == 1
    with planted("numpy", "NumPy", "normalise", spoiled(right, shuffled)):
        for _ in range(2):  # processes
            forget()
            with one_warning("normalise by NumPy"):
                found = normalise(np, *x)
            assert_same_bits(found, normalise.__wrapped__(np, *x))
    forget()
    with tries() as tried, planted("numpy", "NumPy", "normalise", right):
        normalise(np, *x)
    assert tried.call_count == 0
    assert settled == {right: True}


@pytest.mark.parametrize("change", ["numpy", "numba", "processor", "sources", "instructions"])
@pytest.mark.usefixtures("watched")
def test_another_machine_or_version_has_another_result(monkeypatch, change):
    found = machine.describe("numpy")
    with tries() as tried, planted("numpy", "NumPy", "rotate", BODIES["rotate"]):
        rotate(np, *inputs("rotate"))
        monkeypatch.setattr(machine, "describe", lambda library: found | {change: "another"})
        forget()
        rotate(np, *inputs("rotate"))
        assert tried.call_count == 2
        monkeypatch.setattr(machine, "describe", lambda library: found)
        forget()
        rotate(np, *inputs("rotate"))
    assert tried.call_count == 2


def test_facts_follow_versions_sources_and_environment(monkeypatch, tmp_path):
    before = machine.describe("numpy")
    assert before == machine.describe("numpy")
    assert before["numpy"] == np.__version__
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert machine.describe("numpy") == before | {"NUMBA_CPU_NAME": "generic"}
    for name in ("backends/numpy/linear.py", "backends/cupy/kernels/gemv.cu", "layers/norm.py"):
        for path in (tmp_path / "backends/machine.py", tmp_path / name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        monkeypatch.setattr(machine, "__file__", str(tmp_path / "backends/machine.py"))
        empty = machine._digest()
        (tmp_path / name).write_text("changed")
        assert machine._digest() != empty


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"bodies": []}', '{"bodies": {"normalise by NumPy": {"ratio": 0.5}}',
     '{"bodies": {"normalise by NumPy": {"ratio": null, "problem": null}}}',
     '{"bodies": {"normalise by NumPy": {"ratio": 7.0, "problem": null}}}',
     '{"bodies": {"normalise by NumPy": {"ratio": true, "problem": null}}}',
     '{"bodies": {"normalise by NumPy": {"ratio": 0.5, "problem": 3}}}',
     '{"bodies": {"normalise by NumPy": {"ratio": NaN, "problem": null}}}',
     '{"bodies": {"normalise by NumPy": "fine"}}', "[" * 100_000, "\udce4"],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_written_anew(watched, text):
    with tries() as tried, planted("numpy", "NumPy", "normalise", BODIES["normalise"]):
        normalise(np, *inputs("normalise"))
        (file,) = (watched / "bodies").iterdir()
        written = json.loads(file.read_text())
        file.write_text(text, errors="surrogateescape")
        forget()
        normalise(np, *inputs("normalise"))
    assert tried.call_count == 2
    assert json.loads(file.read_text()) == written


def test_where_nothing_can_be_written(watched, monkeypatch):
    (watched / "file").touch()
    monkeypatch.setenv("LLAMA_LAYERS_CACHE", str(watched / "file"))
    with tries() as tried, planted("numpy", "NumPy", "normalise", BODIES["normalise"]):
        for _ in range(2):
            forget()
            normalise(np, *inputs("normalise"))
    assert tried.call_count == 2


@pytest.mark.usefixtures("watched")
def test_processes_keep_each_other_s_results():
    """Two that read the file before either wrote to it."""
    x, y = inputs("normalise"), inputs("rotate")
    found = {}
    for name in ("normalise", "rotate"):
        forget()
        found[name] = trust._results("numpy")
    for name, results in found.items():
        body = Body("numpy", "NumPy", name, BODIES[name])
        results.put(str(body), trust.tried(body)[0])
    forget()
    chain = trusted("numpy", NumPy={name: BODIES[name] for name in ("normalise", "rotate")})
    with tries() as tried, mock.patch.dict(routes("numpy"), chain, clear=True):
        normalise(np, *x)
        rotate(np, *y)
    assert not tried.called


@pytest.mark.parametrize("error", [MemoryError, OSError])
def test_what_may_be_otherwise_another_time_is_not_remembered(watched, error):
    def failing(*arguments):
        raise error("not now")

    with planted("numpy", "NumPy", "normalise", failing), one_warning("not now"):
        normalise(np, *inputs("normalise"))
    assert not (watched / "bodies").exists()


@pytest.mark.parametrize("watching", [True, False])
@pytest.mark.usefixtures("watched")
def test_what_is_compiled_and_tried_is_announced_where_somebody_watches(watching, capsys):
    body, x = mock.Mock(wraps=BODIES["normalise"], takes=None), inputs("normalise")
    with (
        mock.patch.object(sys.stderr, "isatty", return_value=watching),
        planted("numpy", "numba", "normalise", body),
    ):
        for _ in range(2):
            normalise(np, *x)
    said = "llama_layers: trying normalise by numba on this machine, once ...\n"
    assert capsys.readouterr().err == (said if watching else "")


@pytest.mark.usefixtures("watched")
def test_threads_wait_for_one_result():
    x = inputs("normalise")
    found, barrier = [], threading.Barrier(6)

    def work():
        barrier.wait()
        found.append(normalise(np, *x))

    with tries() as tried, planted("numpy", "NumPy", "normalise", BODIES["normalise"]):
        workers = [threading.Thread(target=work) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert tried.call_count == 1
    for y in found:
        assert_same_bits(y, found[0])


def test_unseen_where_the_environment_says_so(watched, monkeypatch):
    monkeypatch.setenv("LLAMA_LAYERS_VERIFY", "0")
    wrong = spoiled(BODIES["normalise"], shuffled)
    x = inputs("normalise")
    with planted("numpy", "NumPy", "normalise", wrong):
        assert_same_bits(normalise(np, *x), wrong(np, *x))
    raising = mock.Mock(side_effect=RuntimeError, takes=None)
    with planted("numpy", "NumPy", "normalise", raising), pytest.raises(RuntimeError):
        normalise(np, *x)
    assert not (watched / "bodies").exists()


@pytest.mark.usefixtures("watched")
def test_a_body_is_not_tried_for_what_it_does_not_take():
    body = mock.Mock(__name__="body")
    narrow = takes(lambda xp, x, weight, eps: x.dtype == np.float64)(body)
    x = inputs("normalise")
    with planted("numpy", "NumPy", "normalise", narrow):
        assert_same_bits(normalise(np, *x), normalise.__wrapped__(np, *x))
    assert not body.called
    assert not settled


@pytest.mark.usefixtures("watched")
def test_a_body_that_takes_none_of_its_inputs():
    @takes(lambda xp, x, weight, eps: x.shape == (6, 8))
    def untried(xp, x, weight, eps):
        return 2 * x

    x = inputs("normalise")
    with planted("numpy", "NumPy", "normalise", untried), one_warning("takes none of"):
        assert_same_bits(normalise(np, *x), normalise.__wrapped__(np, *x))


def test_only_counts_in_its_own_thread_and_can_be_nested():
    x = inputs("normalise")
    one, two = (lambda *_, n=n: n for n in (1, 2))
    with only({"normalise": one}):
        assert normalise(np, *x) == 1
        with only({"normalise": two}):
            assert normalise(np, *x) == 2
        assert normalise(np, *x) == 1
        with only({}):
            assert_same_bits(normalise(np, *x), normalise.__wrapped__(np, *x))
        found = []
        thread = threading.Thread(target=lambda: found.append(normalise(np, *x)))
        thread.start()
        thread.join()
    assert found[0].shape == (6, 8)
    assert normalise(np, *x).shape == (6, 8)


def test_later_processes_read_a_file_and_nothing_else(tmp_path):
    code = """
import sys, numpy
from llama_layers import rms_norm
rms_norm(numpy.ones((1, 8), "f4"), numpy.ones(8, "f4"), eps=1e-5)
print("llama_layers.trial" in sys.modules)
"""
    environment = os.environ | {"LLAMA_LAYERS_CACHE": str(tmp_path), "LLAMA_LAYERS_VERIFY": "1"}
    found = [
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env=environment,
        ).stdout.strip()
        for _ in range(2)
    ]  # fmt: skip
    assert found == ["True", "False"]


def test_where_the_extra_fast_is_not_installed(tmp_path):
    code = """
import sys, numpy
sys.modules |= {"numba": None, "llvmlite": None, "threadpoolctl": None}
from llama_layers import attention, linear, rms_norm, swiglu
from llama_layers.backends.trust import settled
x = numpy.ones((1, 2, 4, 8), "f4")
rms_norm(x, x[0, 0, 0], eps=1e-5), linear(x, x[0, 0]), attention(x, x, x), swiglu(x, x)
print(*settled.values())
"""
    environment = os.environ | {"LLAMA_LAYERS_CACHE": str(tmp_path), "LLAMA_LAYERS_VERIFY": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert (run.stdout, run.stderr) == ("True True True True\n", "")
