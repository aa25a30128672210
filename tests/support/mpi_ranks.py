"""Processes that mpiexec starts, for tests; and programs that they run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Next to Python, where the wheel `mpich` puts it.
MPIEXEC = Path(sys.executable).parent / "mpiexec"
# There are more ranks than cores: one that waits gives its core to another.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "PYTHONPATH": str(ROOT)}


def mpiexec(*parts: list[object], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run programs as ranks of one world; each part is a number of ranks and what they run."""
    words: list[str] = []
    for count, *command in parts:
        words += [":"] * bool(words) + ["-n", str(count), *map(str, command)]
    return subprocess.run(
        [str(MPIEXEC), *words],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# Generates, and prints what each rank counted as a line of JSON.
MEASURE = """
import gc, json, re, sys
import numpy as np
from mpi4py import MPI
from llama_layers import generate, load
from llama_layers.parallel.mpi import MPIGroup

path, count, *ids = json.loads(sys.argv[1])

class Counted(MPIGroup):
    reduced = ()

    def all_reduce(self, array):
        self.reduced += (array.nbytes,)
        return super().all_reduce(array)

def anonymous():
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"^Anonymous: +(\\d+) kB", file.read(), re.M)[1]) << 10

def arrays(model):
    for layer in model.weights.layers:
        yield from layer.arrays().values()
    yield from (model.weights.embed_tokens, model.weights.norm, model.weights.lm_head)

def in_file(model):
    # Pages of the mapped file that the arrays lie in. Linux would count their neighbours, too:
    # it maps them with what is read, as it likes.
    ranges = []
    for line in open("/proc/self/maps"):
        if "safetensors" in line:
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    pages = set()
    for array in arrays(model):
        if array is not None:
            low, high = np.lib.array_utils.byte_bounds(array)
            if any(start <= low < end for start, end in ranges):
                pages.update(range(low // 4096, (high + 4095) // 4096))
    return len(pages) * 4096

group = Counted(MPI.COMM_WORLD)
model = load(path, parallel=group)
before = anonymous()
for array in arrays(model):
    if array is not None:
        array.sum()
held = anonymous() - before, in_file(model)
options = {"max_new_tokens": count, "eos_token_id": ()}
tokens = [int(step[0]) for step in generate(model, np.array([ids]), **options)]
lines = group.gather({"tokens": tokens, "reduced": group.reduced, "held": held})
if group.rank == 0:
    print(json.dumps(lines))
"""

# Runs forward passes until something goes wrong on rank 1, and says when that was.
FAIL = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
from llama_layers import forward, generate, load

def end():
    sys.exit(3)

def fail():
    raise ValueError("bad luck\\nwith two lines")

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def leave():
    return True

how, *paths = sys.argv[1:]
comm = MPI.COMM_WORLD
model = load(paths[comm.rank % len(paths)], parallel=comm)
for count, _ in enumerate(generate(model, np.array([[1]]), max_new_tokens=10**6, eos_token_id=())):
    if count == 3 and comm.rank == 1:
        print("failed at", time.time(), flush=True)
        if globals()[how]():
            break
"""


# Models of several communicators in one world of four ranks: each must be the whole one's equal.
SEVERAL = """
import copy, pickle, sys
import numpy as np
from mpi4py import MPI
from llama_layers import forward, load
from llama_layers.parallel.connect import connect

path, world = sys.argv[1], MPI.COMM_WORLD
pair = world.Split(world.rank % 2)
ids = np.array([[1, 2, 3]])
whole = forward(load(path), ids).logits
models = [load(path, parallel=comm) for comm in (MPI.COMM_SELF, pair, world, pair)]
models.append(copy.deepcopy(models[2]))
for model in models:
    np.testing.assert_allclose(forward(model, ids).logits, whole, rtol=1e-4, atol=1e-4)
heads = [model.config.num_attention_heads for model in models]
assert heads == [4, 2, 1, 2, 1], heads
assert models[1].weights.group is models[3].weights.group is connect(pair)
for refused in (models[1], models[1].weights.layers[0]):
    try:
        pickle.dumps(refused)
    except TypeError as error:
        assert "cannot be pickled" in str(error), error
        print(error)
world.Barrier()
if world.rank == 3:  # the others have ended, and nobody waits for them
    import time
    time.sleep(1.5)
    print("the last one")
"""
