"""Bodies are tried before they serve: wrong ones are bypassed, and the verdict is remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from watched_bodies import forget, one_warning, planted, spoiled

from llama_layers.attend import attend
from llama_layers.backends import dispatch, machine, trust
from llama_layers.backends.dispatch import Offer, only, routes
from llama_layers.backends.numpy import BODIES
from llama_layers.embedding import activations
from llama_layers.feed_forward import gate_with_silu
from llama_layers.mask import Mask
from llama_layers.norm import normalise
from llama_layers.projection import linear_2d
from llama_layers.rope import turn
from llama_layers.testing import assert_same_bits
from llama_layers.verify import bodies

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DEFINITIONS = {
    function.__name__: function
    for function in (activations, attend, gate_with_silu, linear_2d, normalise, turn)
}


def inputs(name):
    """What the dispatcher is called with, beside the namespace."""
    rng = np.random.default_rng(0)
    x, other = rng.standard_normal((2, 2, 3, 2, 8), dtype=np.float32)
    angles = rng.uniform(-1, 1, (2, 1, 3, 4)).astype(np.float32)
    matrix, weight = rng.standard_normal((6, 8), dtype=np.float32), np.ones(8, np.float32)
    return {
        "activations": (x[0],),
        "attend": (x, x, other, Mask(np.arange(3), np.arange(3)), 0.5),
        "gate_with_silu": (x, other),
        "linear_2d": (matrix, matrix, None),
        "normalise": (matrix, weight, 1e-5),
        "turn": (x, *angles, "half"),
    }[name]


def only_for(dtype, spoil):
    """Change results of one format only."""
    return lambda y, xp, x, *rest: spoil(y) if x.dtype == dtype else y


def without_tail(y, *_):
    """Numbers beyond the last whole vector of 16 are left out."""
    y[..., y.shape[-1] // 16 * 16 :] = 0
    return y


def shuffled(y, *_):
    return np.roll(y, 1, axis=-1)


def off_by_three(y):
    """In the last place."""
    return y * (1 + 3 * y.dtype.type(np.finfo(np.float32).eps))


def without_nan(y, *_):
    return np.where(np.isfinite(y), y, y.dtype.type(0))


def changed_input(y, xp, x, *_):
    x[...] = 0
    return y


def seeing_what_is_hidden(y, xp, q, k, v, mask, scale):
    """The rows that see nothing get the mean of all values."""
    empty = (y == 0).all(axis=(2, 3))
    y[empty] = v.astype(np.float32).mean()
    return y


def unmasked(windows, padding):
    def change(y, xp, q, k, v, mask, scale):
        if not isinstance(mask, Mask):
            return y
        window = None if windows else mask.window
        keep = None if padding else mask.keep
        changed = Mask(mask.queries, mask.keys, window, keep)
        return BODIES["attend"](xp, q, k, v, changed, scale)

    return change


def first_of_all(y, xp, q, k, v, mask, scale):
    """The padding of the first sequence for all of them."""
    if not isinstance(mask, Mask) or mask.keep is None:
        return y
    keep = np.repeat(mask.keep[:1], len(q), axis=0)
    return BODIES["attend"](xp, q, k, v, Mask(mask.queries, mask.keys, mask.window, keep), scale)


def another_layout(y, xp, x, cos, sin, layout):
    return BODIES["turn"](xp, x, cos, sin, "half")


def angles_of_the_first(y, xp, x, cos, sin, layout):
    if cos.ndim == 3:
        cos, sin = cos[:1], sin[:1]
    return BODIES["turn"](xp, x, cos, sin, layout)


def rounded_parts(y, xp, x, weight, bias):
    """Halves of a sum in 16 bits before they are added."""
    half = x.shape[1] // 2
    if x.dtype != BFLOAT16:
        return y
    parts = (
        BODIES["linear_2d"](xp, x[:, part], weight[:, part], None)
        for part in (np.s_[:half], np.s_[half:])
    )
    total = sum(part.astype(np.float32) for part in parts)
    return (total if bias is None else total + bias.astype(np.float32)).astype(x.dtype)


def without_bias(y, xp, x, weight, bias):
    return BODIES["linear_2d"](xp, x, weight, None) if x.dtype == np.float16 else y


def without_last_row(y, xp, x, weight, bias):
    """Of a number of rows that is no multiple of four."""
    if len(weight) % 4:
        y[:, -1] = 0
    return y


def many_tokens(y, xp, x, weight, bias):
    y[16:17] += 1
    return y


PLANTS = [
    ("activations", "rounded", lambda y, *_: y.astype(np.float16).astype(y.dtype)),
    ("activations", "as stored", lambda y, xp, x: x),
    ("normalise", "tails", without_tail),
    ("normalise", "bfloat16", only_for(BFLOAT16, lambda y: y * y.dtype.type(1.02))),
    ("normalise", "float64 in float32", lambda y, *_: y.astype(np.float32).astype(y.dtype)),
    ("normalise", "NaN", without_nan),
    ("normalise", "its input", changed_input),
    ("normalise", "no eps", lambda y, xp, x, w, eps: BODIES["normalise"](xp, x, w, 0.0)),
    ("turn", "another layout", another_layout),
    ("turn", "angles of the first sequence", angles_of_the_first),
    ("turn", "NaN", without_nan),
    ("turn", "float16", only_for(np.float16, shuffled)),
    ("gate_with_silu", "tails", without_tail),
    ("gate_with_silu", "float32", only_for(np.float32, lambda y: y * np.float32(1 + 1e-5))),
    ("gate_with_silu", "NaN", without_nan),
    ("linear_2d", "bfloat16", rounded_parts),
    ("linear_2d", "bias in float16", without_bias),
    ("linear_2d", "last row", without_last_row),
    ("linear_2d", "many tokens", many_tokens),
    ("linear_2d", "NaN", without_nan),
    ("linear_2d", "transposed in memory", lambda y, *_: y.T),
    ("attend", "empty rows", seeing_what_is_hidden),
    ("attend", "windows", unmasked(True, False)),
    ("attend", "padding", unmasked(False, True)),
    ("attend", "padding of the first sequence", first_of_all),
    ("attend", "heads", lambda y, *_: np.roll(y, 1, axis=2)),
    ("attend", "scaled twice", lambda y, xp, *a: BODIES["attend"](xp, *a[:-1], a[-1] ** 2)),
    ("attend", "NaN", without_nan),
    ("attend", "float16", only_for(np.float16, lambda y: y * np.float16(1.01))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil"), [p[::2] for p in PLANTS], ids=[f"{n}: {what}" for n, what, _ in PLANTS]
)
@pytest.mark.usefixtures("watched")
def test_a_wrong_body_is_bypassed(name, spoil):
    arguments = inputs(name)
    before = [np.copy(a) for a in arguments if isinstance(a, np.ndarray)]
    wrong = spoiled(BODIES[name], spoil)
    warned = f"{name} by NumPy is not used on {machine.processor()}"
    with planted("numpy", "NumPy", name, wrong), one_warning(warned):
        found = [DEFINITIONS[name](np, *arguments) for _ in range(2)]
    for y in found:
        assert_same_bits(y, DEFINITIONS[name].__wrapped__(np, *arguments))
    for array, copy in zip(
        (a for a in arguments if isinstance(a, np.ndarray)), before, strict=True
    ):
        assert_same_bits(array, copy)
    assert dispatch.settled == {wrong: False}


@pytest.mark.parametrize("name", sorted(BODIES))
@pytest.mark.usefixtures("watched")
def test_the_right_ones_serve(name):
    arguments = inputs(name)
    with planted("numpy", "NumPy", name, mock.Mock(wraps=BODIES[name], takes=None)):
        body = routes("numpy")["NumPy"][name]
        y = DEFINITIONS[name](np, *arguments)
        assert dispatch.settled == {body: True}
        calls = body.call_count
        assert_same_bits(DEFINITIONS[name](np, *arguments), y)
        assert body.call_count == calls + 1


def test_every_body_is_tried():
    for library in ("numpy", "cupy"):
        for offers in routes(library).values():
            assert set(offers) <= set(bodies.OPERATIONS)


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
    chain = {"first": {"normalise": wrong}, "NumPy": {"normalise": second}}
    with mock.patch.dict(routes("numpy"), chain, clear=True), one_warning("normalise by first"):
        normalise(np, *inputs("normalise"))
    assert dispatch.settled == {wrong: False, second: True}


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
    assert dispatch.settled[body]


@pytest.mark.usefixtures("watched")
def test_a_caller_s_error_state_does_not_count():
    with np.errstate(all="raise"):
        normalise(np, *inputs("normalise"))
    assert dispatch.settled[routes("numpy")["NumPy"]["normalise"]]


def tries():
    return mock.patch.object(bodies, "verdict_on", side_effect=bodies.verdict_on)


@pytest.mark.parametrize("right", [True, False])
def test_a_verdict_is_remembered(watched, right):
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


@pytest.mark.parametrize("change", ["numpy", "numba", "processor", "sources", "instructions"])
@pytest.mark.usefixtures("watched")
def test_another_machine_or_version_is_another_verdict(monkeypatch, change):
    found = machine.facts("numpy")
    with tries() as tried, planted("numpy", "NumPy", "turn", BODIES["turn"]):
        turn(np, *inputs("turn"))
        monkeypatch.setattr(machine, "facts", lambda library: found | {change: "another"})
        forget()
        turn(np, *inputs("turn"))
        assert tried.call_count == 2
        monkeypatch.setattr(machine, "facts", lambda library: found)
        forget()
        turn(np, *inputs("turn"))
    assert tried.call_count == 2


def test_facts_follow_versions_sources_and_environment(monkeypatch, tmp_path):
    before = machine.facts("numpy")
    assert before == machine.facts("numpy")
    assert before["numpy"] == np.__version__
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert machine.facts("numpy") == before | {"NUMBA_CPU_NAME": "generic"}
    for name in ("backends/numpy/linear.py", "backends/cupy/kernels/gemv.cu", "norm.py"):
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
     '{"bodies": {"normalise by NumPy": "fine"}}', "\udce4"],
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
def test_processes_keep_each_other_s_verdicts():
    """Two that read the file before either wrote to it."""
    x, y = inputs("normalise"), inputs("turn")
    verdicts = []
    for name in ("normalise", "turn"):
        forget()
        verdicts.append(trust._verdicts("numpy"))
        offer = Offer("numpy", "NumPy", name, BODIES[name])
        verdicts[-1].put(offer, trust.tried(offer)[0])
    forget()
    chain = {"NumPy": {name: BODIES[name] for name in ("normalise", "turn")}}
    with tries() as tried, mock.patch.dict(routes("numpy"), chain, clear=True):
        normalise(np, *x)
        turn(np, *y)
    assert not tried.called


@pytest.mark.parametrize("error", [MemoryError, OSError])
def test_what_may_be_otherwise_another_time_is_not_remembered(watched, error):
    def failing(*arguments):
        raise error("not now")

    with planted("numpy", "NumPy", "normalise", failing), one_warning("not now"):
        normalise(np, *inputs("normalise"))
    assert not (watched / "bodies").exists()


@pytest.mark.usefixtures("watched")
def test_threads_wait_for_one_verdict():
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
def test_a_body_that_takes_none_of_its_inputs():
    def untried(xp, x, weight, eps):
        return 2 * x

    untried.takes = lambda xp, x, weight, eps: x.shape == (6, 8)
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
print("llama_layers.verify.bodies" in sys.modules)
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
