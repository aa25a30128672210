"""`check` over executors: the report of a serial check, from jobs that need one layer each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_layers import load
from llama_layers.checkpoint.checkpoint import Checkpoint
from llama_layers.errors import TraceError
from llama_layers.verify import Trace, check, linear_bound, record
from llama_layers.verify.jobs import opened_once
from tests.support import tiny
from tests.support.random_models import CONFIGS, GQA, model_of, random_weights
from tests.support.remote import Remote, same

DEEP = replace(GQA, num_hidden_layers=4)
IDS = np.array([[3, 1, 4, 1, 5]])


def both(trace, model, executor=None, **options):
    """The report of a serial check, which is that of one over an executor."""
    seen, seen_by_jobs = [], []
    serial = check(trace, model, progress=seen.append, **options)
    jobs = executor or Remote()
    parallel = check(trace, model, progress=seen_by_jobs.append, executor=jobs, **options)
    same(serial, parallel)
    assert [r.site for r in seen] == [r.site for r in seen_by_jobs]
    return serial


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    weights = random_weights(DEEP, dtype=np.float32)
    return tiny.write_single(tmp_path_factory.mktemp("model"), weights, DEEP)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


@pytest.fixture(scope="module")
def port(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("port") / "port.safetensors"
    record(model, IDS).save(path)
    return path


def spoilt(trace, *names, change=lambda array: array + 1):
    arrays = {name: np.array(trace.arrays[name]) for name in trace.arrays}
    return replace(trace, arrays=arrays | {name: change(arrays[name]) for name in names})


@settings(max_examples=6)
@given(kind=st.sampled_from(sorted(CONFIGS)), seed=st.integers(0, 1000), data=st.data())
def test_the_report_is_that_of_a_serial_check(kind, seed, data):
    """Of any sites, right or wrong, in any format."""
    weights = random_weights(CONFIGS[kind], seed, np.float32)
    model = model_of(CONFIGS[kind], weights)
    ids = np.random.default_rng(seed).integers(0, GQA.vocab_size, (2, 5))
    mask = np.array([[1] * 5, [0, 0, 1, 1, 1]]) if data.draw(st.booleans()) else None
    pairs = ["*"] if data.draw(st.booleans()) else None
    trace = record(model, ids, attention_mask=mask, sites=pairs)
    names = st.sampled_from(sorted(trace.arrays))
    kept = data.draw(st.sets(names, min_size=1) | st.just(set(trace.arrays)))
    wrong = data.draw(st.sets(st.sampled_from(sorted(kept)), max_size=3))
    narrow = data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]))
    change = data.draw(
        st.sampled_from(
            [lambda a: a + 1, np.zeros_like, lambda a: a * 1.0001, lambda a: a * np.nan]
        )
    )
    arrays = {
        name: np.asarray(change(array) if name in wrong else array).astype(narrow)
        for name, array in trace.arrays.items()
        if name in kept
    }
    explain = len(kept) == len(trace.arrays) and len(wrong) < 2  # or else it takes seconds
    both(replace(trace, arrays=arrays, metadata={}), model, explain=explain)


def test_rounding_that_is_rarely_so_large():
    """The remark on it names mistakes, which are looked for where the site is."""
    config = replace(GQA, intermediate_size=400)
    model = model_of(config, random_weights(config, dtype=np.float32))
    trace = record(model, IDS)
    bound = linear_bound(
        trace.arrays["model.layers.1.mlp.act"], model.weights.layers[1].mlp.down_proj
    )
    far = (bound.exact + (bound.limit + bound.usual) / 2).astype(np.float32)
    report = both(spoilt(trace, "model.layers.1.mlp.down_proj", change=lambda a: far), model)
    (note,) = (r.note for r in report.results if r.verdict == "WARN")
    assert note.startswith("rounding can explain it, but errors are larger than usual")


def test_a_mistake_in_every_layer(model, port):
    names = [f"model.layers.{n}.self_attn.{x}_rope" for n in range(4) for x in "qk"]
    halves = lambda a: np.roll(a, 1, axis=-1)  # noqa: E731
    report = both(spoilt(Trace.load(port), *names, change=halves), model)
    assert len(report.failures) >= len(names)
    both(spoilt(Trace.load(port), *names, change=np.zeros_like), model, explain=False)


@pytest.mark.slow
def test_processes(model, port, tmp_path):
    """As users have them; the trace in a file, in memory, and in NumPy's files."""
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    trace = Trace.load(port)
    for name, array in trace.arrays.items():
        np.save(arrays / f"{name}.npy", array)
    np.save(arrays / "input_ids.npy", trace.input_ids)
    np.savez(tmp_path / "port.npz", input_ids=trace.input_ids, **trace.arrays)
    wrong = spoilt(trace, "model.layers.2.mlp.act")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for each in (trace, wrong, Trace.load(arrays), Trace.load(tmp_path / "port.npz")):
            both(each, model, pool)
        in_memory = model_of(DEEP, random_weights(DEEP, dtype=np.float32))
        both(wrong, in_memory, pool)


def test_what_is_no_executor(model, port):
    for wrong, got in ((2, "int"), (ThreadPoolExecutor, "the class ThreadPoolExecutor")):
        with pytest.raises(TypeError, match=f"^executor: .*concurrent.futures, got {got}"):
            check(Trace.load(port), model, executor=wrong)


def test_a_file_in_bfloat16(checkpoint, tmp_path):
    model = load(checkpoint, dtype="bfloat16")
    path = tmp_path / "port.safetensors"
    arrays = {n: a.astype(ml_dtypes.bfloat16) for n, a in record(model, IDS).arrays.items()}
    spoilt(Trace(arrays, IDS), "model.layers.2.mlp.act").save(path)
    trace = Trace.load(path)
    assert {array.dtype for array in trace.arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert both(trace, model).first.site.name == "model.layers.2.mlp.act"


def test_threads(model, port):
    with ThreadPoolExecutor(2) as pool:
        both(Trace.load(port), model, pool)


def test_a_job_is_small_and_the_head_comes_first(model, port):
    executor = Remote()
    trace = Trace.load(port)
    both(trace, model, executor)
    assert len(executor.sent) == DEEP.num_hidden_layers + 2
    assert max(map(len, executor.sent)) < 12_000
    assert b"lm_head" in executor.sent[1]  # after the embedding, and before the layers
    in_memory = Remote()
    both(spoilt(trace, "model.norm"), model, in_memory)
    nbytes = sum(array.nbytes for array in trace.arrays.values())
    assert sum(map(len, in_memory.sent)) < 2 * nbytes + 8192 * len(in_memory.sent)
    for layer, job in enumerate(in_memory.sent[2:]):
        found = pickle.loads(job).__self__.arrays
        stream = f"model.layers.{layer - 1}" if layer else "model.embed_tokens"
        assert {name for name in found if f"layers.{layer}" not in name} == {stream}


def test_a_worker_reads_a_layer_and_keeps_none(model, port, monkeypatch):
    jobs, right = [], Checkpoint.read_rows

    def read_rows(self, names, *args, **options):
        jobs[-1].add(names[0].split(".")[2] if "layers" in names[0] else names[0])
        return right(self, names, *args, **options)

    class Counted(Remote):
        def run(self):
            while self.waiting:
                future, job = self.waiting.pop()
                jobs.append(set())
                future.set_result(pickle.loads(job)())

    monkeypatch.setattr(Checkpoint, "read_rows", read_rows)
    opened_once.cache_clear()
    for _ in range(2):
        check(Trace.load(port), model, executor=Counted())
    table, norm = "model.embed_tokens.weight", "model.norm.weight"
    layers = [{"3"}, {"2"}, {"1"}, {"0"}]
    assert jobs == 2 * [*layers, {"lm_head.weight", norm}, {table}]


def test_layers_whose_input_is_missing_are_one_job(model, port):
    trace = Trace.load(port)
    some = {n: trace.arrays[n] for n in trace.arrays if n.count(".") > 2}  # no layer's output
    executor = Remote()
    report = both(replace(trace, arrays=some), model, executor)
    assert len(executor.sent) == 1
    assert any(result.verdict == "SEEN" for result in report.results)
    outputs = {n: trace.arrays[n] for n in trace.arrays if n.count(".") == 2}
    executor = Remote()
    both(replace(trace, arrays=outputs), model, executor)
    assert len(executor.sent) == DEEP.num_hidden_layers + 1


def test_an_error_in_a_worker_comes_here_and_ends_the_rest(model, port, tmp_path):
    path = tmp_path / "port.safetensors"
    path.write_bytes(port.read_bytes())
    trace, executor = Trace.load(path), Remote()
    os.utime(path, ns=(1, 1))
    with pytest.raises(TraceError, match="expected the file that was opened, got another"):
        check(trace, model, executor=executor)
    assert [future.cancelled() for future, _ in executor.waiting] == [False, *[True] * 4]


def test_a_worker_that_is_killed_ends_the_check(model, port):
    class Killed(ProcessPoolExecutor):
        def submit(self, job, /):
            last = f"layers.{DEEP.num_hidden_layers - 1}.".encode() in pickle.dumps(job)
            return super().submit(os._exit, 9) if last else super().submit(job)

    with (
        Killed(2, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(BrokenProcessPool),
    ):
        check(Trace.load(port), model, executor=pool)
