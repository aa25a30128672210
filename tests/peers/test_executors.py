"""`check` over the executors of Dask and of mpi4py, and a trace by ranks: docs/scale.md."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from llama_layers import load
from llama_layers.verify import Trace, check, record
from tests.support import tiny
from tests.support.random_models import GQA, random_weights

pytestmark = pytest.mark.peer

# Prints the report of a check over MPI, but for the time that it took.
PROGRAM = """
import sys
from dataclasses import replace
from mpi4py.futures import MPIPoolExecutor
from llama_layers import load
from llama_layers.verify import Trace, check

if __name__ == "__main__":
    model, port = sys.argv[1:]
    with MPIPoolExecutor() as pool:
        report = check(Trace.load(port), load(model), executor=pool)
    print(replace(report, seconds=0.0).text(every=True))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of three layers, and a trace of it with a mistake in each."""
    directory = tmp_path_factory.mktemp("files")
    config = replace(GQA, num_hidden_layers=3)
    model = tiny.write_single(directory, random_weights(config, dtype=np.float32), config)
    trace = record(load(model), np.array([[3, 1, 4, 1, 5]]))
    wrong = {n: np.roll(a, 1, -1) if "q_rope" in n else a for n, a in trace.arrays.items()}
    replace(trace, arrays=wrong).save(directory / "port.safetensors")
    return model, directory / "port.safetensors"


@pytest.fixture(scope="module")
def expected(files):
    report = check(Trace.load(files[1]), load(files[0]))
    assert len(report.failures) >= 3
    return replace(report, seconds=0.0).text(every=True)


def test_dask(files, expected):
    distributed = pytest.importorskip("distributed")
    model, port = load(files[0]), Trace.load(files[1])
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        report = check(port, model, executor=client.get_executor())
    assert replace(report, seconds=0.0).text(every=True) == expected


def test_mpi(files, expected, tmp_path):
    pytest.importorskip("mpi4py")
    if (mpiexec := shutil.which("mpiexec")) is None:
        pytest.skip("needs mpiexec")
    program = tmp_path / "check_over_mpi.py"
    program.write_text(PROGRAM)
    command = [mpiexec, "-n", "3", sys.executable, "-m", "mpi4py.futures", program, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected + "\n"


@pytest.mark.parametrize("size", [2, 3])
def test_a_trace_by_ranks(files, tmp_path, size):
    """Three ranks have heads of zeros, and key heads twice."""
    pytest.importorskip("mpi4py")
    if (mpiexec := shutil.which("mpiexec")) is None:
        pytest.skip("needs mpiexec")
    path = tmp_path / "port.safetensors"
    command = [mpiexec, "-n", str(size), sys.executable, "-m", "llama_layers", "trace"]
    options = ["--ids", "3,1,4,1,5", "--model", files[0], "-o", path]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: 48 sites of 5 tokens in float32")
    trace, model = Trace.load(path), load(files[0])
    whole = record(model, np.array([[3, 1, 4, 1, 5]]))
    assert set(trace.arrays) == set(whole.arrays)
    for name, array in whole.arrays.items():
        np.testing.assert_allclose(trace.arrays[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
    assert check(trace, model).verdict == "PASS"
    assert trace.metadata["tensor_parallel"] == f"{size} ranks, float32 reduce"
