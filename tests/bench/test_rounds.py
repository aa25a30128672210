"""Turns, and what of them is timed, by a clock that the test moves."""

import numpy as np
import pytest

from llama_layers import forward
from llama_layers.bench import own_engine
from llama_layers.bench.engine import Engine, model_engine
from llama_layers.bench.job import ModelJob
from llama_layers.bench.measure import check_agreement, run_rounds
from llama_layers.errors import BackendError
from tests.support import random_models
from tests.support.random_models import GQA


class Clock:
    """Time that passes when something is done, and a record of what was."""

    def __init__(self):
        self.now = 0.0
        self.done = []

    def timed(self, call):
        start = self.now
        call()
        return self.now - start

    def spend(self, seconds, *what):
        self.now += seconds
        self.done.append(what)


def engine(name, seconds, clock):
    def prepare(size):
        clock.spend(1000, "prepare", name, size)
        return lambda: clock.spend(seconds * size, "call", name, size)

    return Engine(name, "", prepare)


def turns(names, rounds, sizes=(1, 8)):
    clock = Clock()
    found = run_rounds(
        [engine(name, seconds, clock) for seconds, name in enumerate(names, 1)],
        sizes,
        rounds=rounds,
        timed=clock.timed,
        settle=lambda: clock.spend(10, "settle"),
        between=lambda: clock.spend(100, "between"),
    )
    return found, clock.done


def test_every_round_has_everyone_once_and_begins_with_another():
    _, done = turns("abc", 4)
    called = [(name, size) for what, *(name, size) in (d for d in done if d[0] == "call")]
    order = {1: "abc", 2: "bca", 3: "cab", 4: "abc"}
    expected = [(n, size) for round_ in order for size in (1, 8) for n in order[round_]]
    assert called == expected


def test_only_the_call_is_timed():
    found, _ = turns("ab", 3)
    assert found == {
        1: {"a": [1.0] * 3, "b": [2.0] * 3},
        8: {"a": [8.0] * 3, "b": [16.0] * 3},
    }


def test_threads_settle_before_each_turn_and_limits_are_probed_before_each_round():
    _, done = turns("ab", 2, [5])
    turn = {n: [("settle",), ("prepare", n, 5), ("call", n, 5)] for n in "ab"}
    first, second = [*turn["a"], *turn["b"]], [*turn["b"], *turn["a"]]
    assert done == [("between",), *first, ("between",), *second]


class Recorder:
    """Keeps what it is fed: its cache is the list of ids."""

    name, numbers = "recorder", ""

    def __init__(self):
        self.fed = []

    def start(self, length):
        self.length = length
        return []

    def copy(self, state):
        return list(state)

    def feed(self, state, ids):
        state += ids[0].tolist()
        assert len(state) <= self.length
        self.fed.append(ids.shape[1])
        return list(state), state

    def to_numpy(self, logits):
        return np.asarray(logits)


@pytest.mark.parametrize(
    ("options", "size", "before", "timed"),
    [
        ({"kind": "decode", "steps": 3}, 5, 5, [1, 1, 1]),
        ({"kind": "prefill"}, 4, 0, [4]),
        ({"kind": "layer", "context": 2}, 4, 2, [4]),
    ],
)
def test_what_a_model_is_fed(options, size, before, timed):
    model = random_models.model_of(GQA, random_models.random_weights(GQA))
    job, runner = ModelJob(model, sizes=[size], **options), Recorder()
    prepare = model_engine(runner, job).prepare
    assert job.ids.shape == (1, before + sum(timed))
    for turn in range(2):
        runner.fed.clear()
        call = prepare(size)
        # All but the last before the first turn only; that one wakes the threads in each.
        waking = [before - 1, 1] if turn == 0 else [1]
        assert runner.fed == (waking if before else [])
        runner.fed.clear()
        assert call() == job.ids[0].tolist()
        assert runner.fed == timed


@pytest.mark.parametrize("options", [{"kind": "decode", "steps": 3}, {"kind": "prefill"}])
def test_ours_gives_the_logits_of_a_pass_without_a_cache(options):
    model = random_models.model_of(GQA, random_models.random_weights(GQA, dtype=np.float32))
    job = ModelJob(model, sizes=[2, 4], **options)
    ready = own_engine.engine(job, 1, None)
    for size in (2, 4, 2):
        before, timed = job.passes(size)
        whole = forward(model, job.ids[:, : before + sum(timed)]).logits[:, -1:, :]
        found = ready.to_numpy(ready.prepare(size)())
        assert np.allclose(found, whole, rtol=1e-4, atol=1e-5)


def of(name, array):
    return Engine(name, "", lambda size: lambda: array)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([[1.0, -2.0]], "b: does other work at size 7: expected the result of a within 0.01"),
        ([[1.0, 2.1]], "got 0.045 off"),
        ([[1.0, 2.0, 3.0]], "got inf off"),
        ([[1.0, np.nan]], "got nan off"),
    ],
)
def test_other_work_is_refused(other, message):
    first = of("a", np.array([1.0, 2.0]))
    with pytest.raises(BackendError, match=message):
        check_agreement([first, of("b", np.array(other))], [7], "float32")
    check_agreement([first, of("b", np.array([1.0, 2.001]))], [7], "float32")
