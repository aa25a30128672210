"""Threads that run one kernel together: errors, interrupts, forks, and the end of the main one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("numba", reason="needs the extra fast")
pytest.importorskip("threadpoolctl", reason="needs the extra fast")

from llama_layers.backends.numba.threadpool import ThreadPool, num_threads


def test_as_many_threads_as_blas_has():
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        assert num_threads() == 1


def test_a_pool_runs_each_thread_once_and_grows():
    pool, ran = ThreadPool(), []
    for size in (1, 3, 2, 4):
        pool.run(size, lambda thread, size, mark: ran.append((mark, size, thread)), size)
        assert sorted(r for r in ran if r[0] == size) == [(size, size, t) for t in range(size)]


def test_an_error_in_any_thread_is_raised():
    def kernel(thread, size):
        if thread == 1:
            raise ValueError("in thread 1")

    with pytest.raises(ValueError, match="in thread 1"):
        ThreadPool().run(2, kernel)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12: threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_pool_of_its_own():
    pool = ThreadPool()
    pool.run(2, lambda thread, size: None)
    child = os.fork()
    if child == 0:
        pool.run(2, lambda thread, size: None)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_an_interrupted_pool_waits_for_nobody_and_goes_on_working():
    pool, ended = ThreadPool(), []

    def kernel(thread, size, stop):
        if thread == 0:
            raise KeyboardInterrupt
        deadline = time.monotonic() + 30
        while not stop[-1] and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.1)
        ended.append(bool(stop[-1]))

    stop = np.zeros(2, np.int64)
    with pytest.raises(KeyboardInterrupt):
        pool.run(2, kernel, stop, stop=stop)
    assert ended == [True]  # by now: what it works on may go
    ran = []
    pool.run(2, lambda thread, size: ran.append(thread))
    assert sorted(ran) == [0, 1]


def test_waiting_ends_when_it_is_to_no_purpose():
    from llama_layers.backends.numba.kernels.spin_wait import spin_until

    state = np.zeros(2, np.int64)
    address = state.ctypes.data
    thread = threading.Thread(target=spin_until, args=(address, 1, address + 8), daemon=True)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    state[1] = 1
    thread.join(30)
    assert not thread.is_alive()


def test_threads_work_on_after_the_main_one_has_ended():
    code = """
import threading, numpy as np
from llama_layers import linear
x, w = np.ones((1, 2, 2048), np.float32), np.ones((2048, 2048), np.float32)
linear(x, w)
def work():
    threading.main_thread().join()
    print(linear(x, w)[0, 0, 0])
threading.Thread(target=work).start()
"""
    environment = os.environ | {"LLAMA_LAYERS_FAST": "1", "OPENBLAS_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert (run.stdout, run.stderr) == ("2048.0\n", "")
